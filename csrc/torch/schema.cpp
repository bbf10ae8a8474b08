// Every operator's schema, in one place. Kernels are registered per backend in the other files of this folder;
// fake kernels, autograd, autocast and FLOP formulas live in deeplab_kernels/ops/.
//
// Shared argument conventions
//   x        (N, C, H, W)       contiguous or channels_last; anything else is copied
//   weight   (C*m, 1, kh, kw)   dtype of x
//   stride   (s_h, s_w), dilation (r_h, r_w), padding (top, bottom, left, right)
//   gamma, beta, mean, var   (C*m,) in the accumulation dtype: float64 for float64 x, otherwise float32
//   activation   0 none, 1 relu, 2 relu6
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(deeplab_kernels, m) {
  // y = conv(x, weight)
  m.def("atrous_depthwise_conv2d(Tensor x, Tensor weight, int[2] stride, int[4] padding, int[2] dilation) -> Tensor");
  // Gradients of the above. A gradient that is not needed comes back as an empty tensor of shape (0,).
  m.def(
      "atrous_depthwise_conv2d_backward(Tensor grad_out, Tensor x, Tensor weight, int[2] stride, int[4] padding, "
      "int[2] dilation, bool need_grad_x, bool need_grad_weight) -> (Tensor, Tensor)");
  // out = act(gamma * (conv(x) - mean) / sqrt(var + eps) + beta) with given statistics (inference, frozen BN).
  // gamma = None means 1, beta = None means 0.
  m.def(
      "atrous_depthwise_bn_act_inference(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor mean, Tensor "
      "var, "
      "float eps, int activation, int[2] stride, int[4] padding, int[2] dilation) -> Tensor");
  // The same with the batch's own statistics. Returns (out, y, mean, var): y = conv(x) if save_conv, otherwise an empty
  // tensor of shape (0,); mean and biased var over (N, H, W), in the accumulation dtype. pre_activation: applied to x
  // first; CPU and plain torch only.
  m.def(
      "atrous_depthwise_bn_act_training(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, float eps, int "
      "activation, "
      "int[2] stride, int[4] padding, int[2] dilation, bool save_conv, int pre_activation=0) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  // Backward of both. y is conv(x) or an empty tensor, in which case it is recomputed from x. batch_statistics tells
  // whether mean and var are functions of x. Returns (grad_x, grad_weight, grad_gamma, grad_beta), the last two in the
  // accumulation dtype, always computed; the first two as in atrous_depthwise_conv2d_backward.
  m.def(
      "atrous_depthwise_bn_act_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor y, Tensor? gamma, Tensor? "
      "beta, "
      "Tensor mean, Tensor var, float eps, int activation, bool batch_statistics, int[2] stride, int[4] padding, "
      "int[2] dilation, bool need_grad_x, bool need_grad_weight, int pre_activation=0) -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  // The whole separable convolution, for inference:
  //   y   = depthwise_act(depthwise_norm(conv(pre_act(x), depthwise_weight)))
  //   out = pointwise_act(pointwise_norm(sum_c pointwise_weight[., c] y_c) + residual)
  // pointwise_weight (C', C*m, 1, 1) and residual, of out's shape, in the dtype of x. norm(z) is
  // gamma (z - mean) / sqrt(var + eps) + beta; None: gamma 1, beta 0, mean 0, and without var no division.
  m.def(
      "atrous_separable_conv2d(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? residual, "
      "Tensor? depthwise_gamma, Tensor? depthwise_beta, Tensor? depthwise_mean, Tensor? depthwise_var, "
      "Tensor? pointwise_gamma, Tensor? pointwise_beta, Tensor? pointwise_mean, Tensor? pointwise_var, "
      "float depthwise_eps, float pointwise_eps, int pre_activation, int depthwise_activation, "
      "int pointwise_activation, int[2] stride, int[4] padding, int[2] dilation) -> Tensor");
  // The 1 x 1 convolution: out = sum_c weight[., c] x_c; weight (C', C, 1, 1).
  m.def("pointwise_conv2d(Tensor x, Tensor weight) -> Tensor");
  // Returns (grad_x, grad_weight), of shape (0,) where not needed.
  m.def(
      "pointwise_conv2d_backward(Tensor grad_out, Tensor x, Tensor weight, bool need_grad_x, bool need_grad_weight) -> "
      "(Tensor, Tensor)");
  // The 1 x 1 convolution with the batch normalisation, residual and activation of batch_norm_act_training after it.
  // Returns (out, z, mean, var): z = sum_c weight[., c] x_c in the dtype of x, mean and biased var of it.
  m.def(
      "pointwise_bn_act_training(Tensor x, Tensor weight, Tensor? residual, Tensor? gamma, Tensor? beta, float eps, "
      "int activation) -> (Tensor, Tensor, Tensor, Tensor)");
  // All rates of an atrous spatial pyramid in one pass over x: out[r] = act(norm_r(conv_r(x))) for R branches of stride
  // 1 whose padding keeps the size ((rate * (k - 1)) / 2 before, the rest after), and the image's mean.
  //   weight (R, C, 1, kh, kw); dilation R pairs (vertical, horizontal), flat; gamma, beta, mean, var (R, C),
  //   contiguous, in the accumulation dtype. mean and var None: the convolutions alone (gamma, beta None, activation
  //   0).
  // Returns (out, pooled): R tensors (N, C, H, W) in the memory format of x, and the mean of x over (H, W), (N, C, 1,
  // 1) in the dtype of x, summed in the accumulation dtype; of shape (0,) without pool.
  m.def(
      "atrous_spatial_pyramid(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, float "
      "eps, int activation, int[] dilation, bool pool) -> (Tensor[], Tensor)");
  // With the batch's own statistics. Returns (out, conv, mean, var, pooled): conv = conv_r(x) like out if save_conv,
  // otherwise an empty list; mean and biased var (R, C) over (N, H, W).
  m.def(
      "atrous_spatial_pyramid_training(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, float eps, int "
      "activation, int[] dilation, bool pool, bool save_conv) -> (Tensor[], Tensor[], Tensor, Tensor, Tensor)");
  // Backward of both. grad_pooled None: pooled took no part. conv empty: recomputed from x. Returns (grad_x,
  // grad_weight, grad_gamma, grad_beta): grad_x summed over the branches and the mean in the accumulation dtype,
  // rounded once; the last two (R, C) in the accumulation dtype, of shape (0,) without mean and var; the first two as
  // in atrous_depthwise_conv2d_backward.
  m.def(
      "atrous_spatial_pyramid_backward(Tensor[] grad_out, Tensor? grad_pooled, Tensor x, Tensor weight, Tensor[] conv, "
      "Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, int activation, bool batch_statistics, int[] "
      "dilation, bool need_grad_x, bool need_grad_weight) -> (Tensor, Tensor, Tensor, Tensor)");
  // out = act(gamma (z - mean) / sqrt(var + eps) + beta + residual) with the batch's own statistics; z and residual
  // (N, C, H, W). Returns (out, mean, var): mean and biased var over (N, H, W), in the accumulation dtype.
  m.def(
      "batch_norm_act_training(Tensor z, Tensor? residual, Tensor? gamma, Tensor? beta, float eps, int activation) -> "
      "(Tensor, Tensor, Tensor)");
  // Backward of the above. out: given where there was a residual before an activation. Returns (grad_z, grad_residual,
  // grad_gamma, grad_beta), the last two in the accumulation dtype; grad_residual has shape (0,) without out, when it
  // is grad_out or not wanted.
  m.def(
      "batch_norm_act_backward(Tensor grad_out, Tensor z, Tensor? out, Tensor? gamma, Tensor? beta, Tensor mean, "
      "Tensor var, float eps, int activation) -> (Tensor, Tensor, Tensor, Tensor)");
  // out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j. values (B, C, N), features (B, d, N) in any floating dtype; the result
  // in the accumulation dtype of values (float64 for float64, otherwise float32), as is grad_out.
  m.def("gaussian_filter(Tensor values, Tensor features) -> Tensor");
  // Gradients of the above, in the dtypes of their tensors; one that is not needed has shape (0,).
  m.def(
      "gaussian_filter_backward(Tensor grad_out, Tensor values, Tensor features, bool need_grad_values, bool "
      "need_grad_features) -> (Tensor, Tensor)");
  // The same sum over the window |dy| <= radius[0], |dx| <= radius[1]. values (B, C, H, W), features (B, d, H, W).
  m.def("local_gaussian_filter(Tensor values, Tensor features, int[2] radius) -> Tensor");
  m.def(
      "local_gaussian_filter_backward(Tensor grad_out, Tensor values, Tensor features, int[2] radius, bool "
      "need_grad_values, bool need_grad_features) -> (Tensor, Tensor)");

  // Fully connected CRF
  //   values         (B, C, N)    any strides, float32, float64, float16 or bfloat16
  //   features       (B, d, N)    in units of the kernel's standard deviation; float32 or float64: what is computed in
  //   lattice        the bytes that permutohedral_lattice made of the same features; None or empty: built inside
  //   normalization  0 none, 1 before, 2 after, 3 symmetric
  m.def("permutohedral_lattice(Tensor features) -> Tensor");
  // F values, or F^T values with transpose.
  m.def(
      "permutohedral_filter(Tensor values, Tensor features, Tensor? lattice, int normalization, bool transpose) -> "
      "Tensor");
  // Returns (grad_values, grad_features), of shape (0,) where not needed.
  m.def(
      "permutohedral_filter_backward(Tensor grad_out, Tensor values, Tensor features, Tensor? lattice, int "
      "normalization, bool transpose, bool need_grad_values, bool need_grad_features) -> (Tensor, Tensor)");
  // Mean-field inference with unary energies (B, L, N) and, per kernel, features, lattice (the list is empty or has one
  // for each), matrix C (L, L) in the dtype of the features, normalization; mask (B, N) bool. Returns E_T in the dtype
  // of unary, and Q_0 ... Q_{T-1} as (T, B, N, L rounded up to a multiple of 8) in that of the features if save,
  // otherwise an empty tensor of shape (0,).
  m.def(
      "dense_crf_mean_field(Tensor unary, Tensor[] features, Tensor[] lattices, Tensor[] compatibility, Tensor? mask, "
      "int[] normalization, int iterations, bool save) -> (Tensor, Tensor)");
  // Gradients w.r.t. unary, features and compatibility; where not needed, of shape (0,). Without saved the iterations
  // run again.
  m.def(
      "dense_crf_mean_field_backward(Tensor grad_out, Tensor saved, Tensor unary, Tensor[] features, Tensor[] "
      "lattices, "
      "Tensor[] compatibility, Tensor? mask, int[] normalization, int iterations, bool need_grad_features, bool "
      "need_grad_compatibility) -> (Tensor, Tensor[], Tensor[])");
}
