"""The DeepLab papers' findings in miniature: small networks trained on drawn scenes, beside the papers' figures.

python -m benchmarks.study                # trains what is not trained yet, measures, writes results/<machine>/study.*
python -m benchmarks.study --scale 0.02   # a rehearsal
"""
