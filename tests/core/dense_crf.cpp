// Exercises the lattice and the mean field of csrc/cpu by themselves, for the sanitizers; and checks them against a
// lattice of std::map. Built and run by test_crf_sanitizers.py. Prints what fails.
#include "../../csrc/cpu/dense_crf/dense_crf.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <thread>
#include <vector>

using namespace deeplab_kernels;
using namespace deeplab_kernels::cpu;

namespace {

int failures = 0;
int64_t thread_count = 1;

void expect(bool good, const char* what, int64_t a = 0, int64_t b = 0) {
  if (!good && ++failures <= 10) std::printf("%s: %lld %lld\n", what, (long long)a, (long long)b);
}

void run_on_threads(int64_t count, int64_t, Parallel::Body body, void* context) {
  const int64_t n = thread_count < count ? thread_count : count;
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < n; ++i) threads.emplace_back([=] { body(context, i * count / n, (i + 1) * count / n); });
  body(context, 0, count / n);
  for (std::thread& t : threads) t.join();
}
const Parallel pool(run_on_threads, [] { return thread_count; });

using Values = std::vector<double>;

template <typename V>
auto strided(V& values, int64_t channels, int64_t points) {
  return Strided<std::remove_reference_t<decltype(values[0])>>{values.data(), channels * points, points, 1};
}
template <typename T>
Strided<const T> in(const std::vector<T>& values, int64_t channels, int64_t points) {
  return {values.data(), channels * points, points, 1};
}

Values random_values(size_t size, double spread, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0, spread);
  Values values(size);
  for (double& v : values) v = normal(engine);
  return values;
}

// The definition, one image: vertices in a map, blurred one direction after the other.
Values by_definition(int d, int64_t points, int64_t channels, const Values& features, const Values& values,
                     bool transpose, double scale) {
  using Key = std::vector<int32_t>;
  std::map<Key, Values> lattice;
  std::vector<std::vector<std::pair<Key, double>>> corners(static_cast<size_t>(points));
  for (int64_t p = 0; p < points; ++p) {
    double position[kMaxLatticeDimension], weight[kMaxLatticeDimension + 2];
    int32_t greedy[kMaxLatticeDimension + 1], rank[kMaxLatticeDimension + 1];
    for (int i = 0; i < d; ++i)
      position[i] = features[i * points + p] * lattice_scale(d, 1 / std::sqrt(double(i + 1) * double(i + 2)));
    lattice_simplex(position, d, greedy, rank, weight);
    for (int k = 0; k <= d; ++k) {
      Key key;
      for (int i = 0; i <= d; ++i) key.push_back(lattice_vertex(greedy[i], rank[i], k, d));
      Values& row = lattice.try_emplace(key, Values(static_cast<size_t>(channels))).first->second;
      for (int64_t c = 0; c < channels; ++c) row[c] += weight[k] * values[c * points + p];
      corners[p].emplace_back(key, weight[k]);
    }
  }
  for (int step = 0; step <= d; ++step) {
    const int j = transpose ? d - step : step;
    std::map<Key, Values> next = lattice;
    for (auto& [key, row] : next)
      for (int sign : {-1, 1}) {
        Key neighbour = key;
        for (int i = 0; i <= d; ++i) neighbour[i] += i == j ? -sign * d : sign;
        if (auto found = lattice.find(neighbour); found != lattice.end())
          for (int64_t c = 0; c < channels; ++c) row[c] += 0.5 * found->second[c];
      }
    lattice.swap(next);
  }
  Values out(static_cast<size_t>(channels * points));
  for (int64_t p = 0; p < points; ++p)
    for (auto& [key, weight] : corners[p])
      for (int64_t c = 0; c < channels; ++c) out[c * points + p] += scale * weight * lattice[key][c];
  return out;
}

double difference(const Values& a, const Values& b) {
  double most = 0, size = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) < 1e300)) return 1e300;
    most = std::max(most, std::abs(a[i] - b[i])), size = std::max(size, std::abs(b[i]));
  }
  return most / size;
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

void filters() {
  for (int d : {1, 2, 3, 5, 9, 16})
    for (int64_t points : {1, 5, 127, 4100}) {
      if (points > 127 && (d > 5 || thread_count == 1)) continue;
      for (double spread : {0.5, 1e6}) {
        if (points > 127 && spread > 1) continue;
        const int64_t channels = d == 3 ? 70 : d == 1 ? 1 : 9;
        const Values features = random_values(size_t(d * points), spread, 1);
        const Values values = random_values(size_t(channels * points), 1, 2);
        const Lattice<double> lattice(1, d, points, in(features, d, points), pool);
        expect(lattice.problem().kind == FeatureProblem::kNone, "problem", d, points);
        for (bool transpose : {false, true}) {
          Values out(values.size(), std::nan(""));
          permutohedral_filter(lattice, channels, in(values, channels, points), strided(out, channels, points),
                               Normalization::kNone, LatticeScale::kExactSum, transpose, pool);
          if (points <= 127) {
            const Values expected =
                by_definition(d, points, channels, features, values, transpose, lattice_exact_scale(d));
            expect(difference(out, expected) < 1e-9, "filter", d, points);
          }
        }
        for (int normalization = 0; normalization < 4; ++normalization) {
          const Values grad = random_values(values.size(), 1, 3);
          Values out(values.size()), grad_values(values.size()), grad_features(features.size(), std::nan(""));
          permutohedral_filter(lattice, channels, in(values, channels, points), strided(out, channels, points),
                               Normalization(normalization), LatticeScale::kExactSum, false, pool);
          permutohedral_filter_backward(lattice, channels, in(grad, channels, points), in(values, channels, points),
                                        in(features, d, points), strided(grad_values, channels, points),
                                        strided(grad_features, d, points), Normalization(normalization),
                                        LatticeScale::kExactSum, false, pool);
          const double forward = dot(grad, out), backward = dot(grad_values, values);
          expect(std::abs(forward - backward) < 1e-9 * (1 + std::abs(forward)), "adjoint", d, normalization);
          for (double g : grad_features) expect(std::isfinite(g), "grad_features", d, normalization);
        }
      }
    }
}

// The same bits from any number of threads, and from a lattice that was packed; three images, one of them a copy.
void threads() {
  const int64_t batch = 3, points = 9001, labels = 21;
  const int dimensions[] = {2, 5};
  std::vector<float> features[2], unary(size_t(batch * labels * points)), grad(unary.size());
  std::mt19937 engine(5);
  std::normal_distribution<float> normal;
  for (float& v : unary) v = normal(engine);
  for (float& v : grad) v = normal(engine);
  for (int m = 0; m < 2; ++m) {
    features[m].resize(size_t(batch * dimensions[m] * points));
    for (float& v : features[m]) v = normal(engine);
    const size_t image = features[m].size() / 3;
    std::memcpy(features[m].data() + 2 * image, features[m].data(), image * sizeof(float));
  }
  std::memcpy(unary.data() + 2 * unary.size() / 3, unary.data(), unary.size() / 3 * sizeof(float));
  std::vector<float> matrices[2];
  for (int m = 0; m < 2; ++m) {
    matrices[m].assign(size_t(labels * labels), m == 0 ? 0.1f : 0.0f);
    for (int64_t i = 0; i < labels; ++i) matrices[m][i * labels + i] = -2;
  }
  std::vector<uint8_t> mask(size_t(batch * points), 1);
  for (size_t i = 0; i < mask.size(); i += 7) mask[i] = 0;
  // With each number of threads, once as a run of points and once as an image's rows.
  std::vector<std::vector<float>> first, of_run;
  for (int64_t n : {1, 4, -1, -4}) {
    const int64_t row = n < 0 ? 131 : 0;
    thread_count = std::abs(n);
    if (n == -1) of_run = std::move(first), first.clear();
    PairwiseKernel<float> kernels[2];
    std::vector<Strided<const float>> feature_views;
    std::vector<Strided<float>> grad_views;
    std::vector<float> energy(unary.size()), q(unary.size()), grad_unary(unary.size()), grad_features[2],
        grad_matrix[2];
    float* grad_matrices[2];
    for (int m = 0; m < 2; ++m) {
      feature_views.push_back(in(features[m], dimensions[m], points));
      kernels[m].lattice =
          Lattice<float>(batch, dimensions[m], points, feature_views[m], pool, Embedding::kAccurate, row);
      std::vector<char> bytes(kernels[m].lattice.packed_bytes());
      kernels[m].lattice.pack(bytes.data());
      expect(Lattice<double>::unpack(bytes.data(), bytes.size()).data() == nullptr, "unpack of another type");
      expect(Lattice<float>::unpack(bytes.data(), bytes.size() - 1).data() == nullptr, "unpack of less");
      kernels[m].lattice = Lattice<float>::unpack(bytes.data(), bytes.size());
      expect(kernels[m].lattice.points() == points && kernels[m].lattice.batch() == batch, "unpack");
      kernels[m].normalization = m == 0 ? Normalization::kSymmetric : Normalization::kAfter;
      kernels[m].compatibility = matrices[m].data();
      grad_features[m].resize(features[m].size());
      grad_views.push_back(strided(grad_features[m], dimensions[m], points));
      grad_matrix[m].resize(size_t(labels * labels));
      grad_matrices[m] = grad_matrix[m].data();
    }
    MeanFieldProblem<float> problem;
    problem.batch = batch, problem.labels = labels, problem.points = points;
    problem.unary = in(unary, labels, points);
    problem.mask = mask.data();
    problem.kernels = kernels, problem.kernel_count = 2;
    std::vector<float> saved(size_t(mean_field_saved_size(batch, labels, points, 2)));
    mean_field(problem, 2, {strided(energy, labels, points), strided(q, labels, points)}, saved.data(), pool);
    MeanField<float> steps(problem, pool);
    std::vector<float> stepped(q.size());
    steps.start({{}, strided(stepped, labels, points)});
    for (int t = 0; t < 2; ++t) {
      const std::vector<float> before = stepped;
      steps.set_q(in(before, labels, points));
      steps.step({{}, strided(stepped, labels, points)}, false);
    }
    expect(stepped == q, "step by step");
    MeanFieldGradients<float> gradients;
    gradients.grad_energy = in(grad, labels, points);
    gradients.saved = saved.data();
    gradients.grad_unary = strided(grad_unary, labels, points);
    gradients.grad_compatibility = grad_matrices;
    gradients.features = feature_views.data();
    gradients.grad_features = grad_views.data();
    mean_field_backward(problem, 2, gradients, pool);
    expect(std::memcmp(q.data(), q.data() + 2 * q.size() / 3, q.size() / 3 * sizeof(float)) != 0, "masks differ");
    std::vector<std::vector<float>> all{
        energy, q, saved, grad_unary, grad_features[0], grad_features[1], grad_matrix[0], grad_matrix[1]};
    for (const auto& values : all)
      for (float v : values) expect(std::isfinite(v), "finite");
    if (first.empty()) first = all;
    for (size_t i = 0; i < all.size(); ++i) expect(all[i] == first[i], "threads", n, int64_t(i));
  }
  expect(first != of_run, "the order of sums differs");
  for (size_t j = 0; j < first[1].size(); ++j) expect(std::abs(first[1][j] - of_run[1][j]) < 1e-4f, "q of rows");
  thread_count = 1;
}

// Results point after point, without gaps: nothing may be written behind them.
void point_by_point() {
  const int64_t points = 300;
  const Values features = random_values(2 * points, 3, 5);
  const Lattice<double> lattice(1, 2, points, in(features, 2, points), pool);
  for (int64_t channels : {1, 2, 7, 8, 9, 21}) {
    const Values values = random_values(size_t(channels * points), 1, 6);
    Values by_channel(values.size()), by_point(values.size());
    const auto filter = [&](Strided<double> out) {
      permutohedral_filter(lattice, channels, in(values, channels, points), out, Normalization::kSymmetric,
                           LatticeScale::kExactSum, false, pool);
    };
    filter(strided(by_channel, channels, points));
    filter({by_point.data(), channels * points, 1, channels});
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < points; ++p)
        expect(by_channel[size_t(c * points + p)] == by_point[size_t(p * channels + c)], "point by point", channels, p);
  }
}

void bad_features() {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (float bad : {nan, infinity, -infinity, 1e30f, -1e9f})
    for (int64_t at : {0, 4999, 2500}) {
      std::vector<float> features(10000);
      features[size_t(5000 + at)] = bad;
      const Lattice<float> lattice(1, 2, 5000, in(features, 2, 5000), pool);
      const FeatureProblem& problem = lattice.problem();
      const auto kind = std::isfinite(bad) ? FeatureProblem::kTooLarge : FeatureProblem::kNotFinite;
      expect(problem.kind == kind && problem.axis == 1 && problem.point == at && problem.image == 0, "problem", at,
             problem.point);
      expect(find_feature_problem(1, 2, 5000, in(features, 2, 5000), pool).point == at, "find_feature_problem", at);
    }
  // The farthest features that are allowed, at both ends, in the dimension with the largest coordinates.
  const int d = kMaxLatticeDimension;
  Values features(size_t(3 * d));
  const double limit = 4e6;
  for (int i = 0; i < d; ++i)
    features[i * 3] = limit, features[i * 3 + 1] = -limit, features[i * 3 + 2] = i % 2 ? limit : -limit;
  const Lattice<double> lattice(1, d, 3, in(features, d, 3), pool);
  expect(lattice.problem().kind == FeatureProblem::kNone, "far features", lattice.problem().axis);
  const Values values = random_values(3, 1, 4);
  Values out(3);
  permutohedral_filter(lattice, 1, in(values, 1, 3), strided(out, 1, 3), Normalization::kNone, LatticeScale::kExactSum,
                       false, pool);
  expect(difference(out, by_definition(d, 3, 1, features, values, false, lattice_exact_scale(d))) < 1e-9,
         "far features");
}

void empty() {
  Values none;
  const Lattice<double> lattice(2, 3, 0, in(none, 3, 0), pool);
  expect(lattice.problem().kind == FeatureProblem::kNone && lattice.vertices() == 0, "no points");
  permutohedral_filter(lattice, 4, in(none, 4, 0), strided(none, 4, 0), Normalization::kSymmetric,
                       LatticeScale::kExactSum, false, pool);
  Values features(6, 0.5);
  const Lattice<double> some(1, 3, 2, in(features, 3, 2), pool);
  Values grad_features(6, 1.0);
  permutohedral_filter(some, 0, in(none, 0, 2), strided(none, 0, 2), Normalization::kAfter, LatticeScale::kExactSum,
                       false, pool);
  permutohedral_filter_backward(some, 0, in(none, 0, 2), in(none, 0, 2), in(features, 3, 2), strided(none, 0, 2),
                                strided(grad_features, 3, 2), Normalization::kAfter, LatticeScale::kExactSum, false,
                                pool);
  expect(grad_features == Values(6), "no channels");
  MeanFieldProblem<double> problem;
  problem.labels = 3;
  mean_field(problem, 2, {}, static_cast<double*>(nullptr), pool);
  std::vector<char> bytes(Lattice<double>().packed_bytes());
  Lattice<double>().pack(bytes.data());
  expect(Lattice<double>::unpack(bytes.data(), bytes.size()).points() == 0, "unpack of nothing");
}

}  // namespace

int main() {
  for (int64_t n : {1, 3}) {
    thread_count = n;
    filters();
    point_by_point();
    bad_features();
    empty();
  }
  threads();
  return failures != 0;
}
