// The seam between tensors and kernels: plain structs of raw pointers, sizes and strides, and one table of
// kernels per device. Nothing of torch is included here, so that a kernel file (CPU or CUDA) needs only this.
//
// What every kernel may rely on (the tensor side in csrc/<op>.cpp has checked or arranged it):
//   - each operand is dense in the layout its struct names, on one device, of the dtype given;
//   - outputs are allocated and do not overlap inputs; a null pointer means "absent" or "not asked for";
//   - no output is empty (sizes that are summed over, like K or C, may be 0).
// What every kernel guarantees: every element of each non-null output is written, nothing else is; the result is
// bitwise the same for any number of threads and from run to run.
#pragma once

#include <cstdint>

namespace pyops {

enum class DType : int32_t { f32, f64, bf16, f16, u8, i8, i16, i32, i64 };

// output[i] = max(input[i], 0), NaN and -0.0 kept. input and output may be the same memory. For a floating dtype, bit
// i % 64 of mask[i / 64] tells whether element i passes its gradient, that is whether output[i] is not <= 0; bits past
// the last element are 0.
struct ReluArgs {
  DType dtype;
  int64_t numel;
  const void* input;
  void* output;
  uint64_t* mask = nullptr;  // null: none
};

// grad_input[i] = output[i] <= 0 ? 0 : grad_output[i]   (a NaN output passes its gradient)
struct ReluBackwardArgs {
  DType dtype;
  int64_t numel;
  const void* grad_output;
  const void* output;
  void* grad_input;
};

// grad_input[i] = bit i of the forward's mask ? grad_output[i] : 0
struct ReluMaskBackwardArgs {
  DType dtype;
  int64_t numel;
  const void* grad_output;
  const uint64_t* mask;
  void* grad_input;
};

// output[M, N] = input[M, K] weight[N, K]^T + bias[N], all row-major; with `relu`, rectified as above. `tf32`: torch's
// flag for the op allows float32 products of operands rounded to TF32; it is set for CUDA alone.
struct LinearArgs {
  DType dtype;
  int64_t M, N, K;
  const void* input;
  const void* weight;
  const void* bias;  // null: none
  void* output;
  bool relu;
  bool tf32;
};

// grad_input[M, K] = grad_output weight; grad_weight[N, K] = grad_output^T input; grad_bias[N] = column sums of
// grad_output. Each is computed only if its pointer is set; input or weight may be null if nothing needs them.
struct LinearBackwardArgs {
  DType dtype;
  int64_t M, N, K;
  const void* grad_output;
  const void* input;
  const void* weight;
  void* grad_input;
  void* grad_weight;
  void* grad_bias;
  bool tf32;
};

struct Conv2dShape {
  int64_t N, C, H, W;  // input
  int64_t O, OH, OW;   // output: [N, O, OH, OW]
  int64_t groups;      // divides C and O; weight: [O, C / groups, kernel_h, kernel_w]
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t padding_top, padding_left;  // bottom and right follow from OH and OW
  int64_t dilation_h, dilation_w;
  bool channels_last;         // input, output and their gradients are stored N H W C rather than N C H W
  bool weight_channels_last;  // weight and its gradient are stored O kH kW C rather than O C kH kW

  // Whether every group has one input and one output channel.
  bool is_depthwise() const { return groups > 1 && C == groups && O == groups; }
};

// output[n, o, y, x] = bias[o] + sum over c, i, j of
//   weight[o, c, i, j] * input[n, g C/groups + c, y stride_h - padding_top + i dilation_h, x stride_w - ...]
// over the taps that lie inside the input only (so an infinite weight over the border gives no NaN).
// With `relu`, rectified, and with `tf32`, rounded as above.
struct Conv2dArgs {
  DType dtype;
  Conv2dShape shape;
  const void* input;
  const void* weight;
  const void* bias;  // null: none
  void* output;
  bool relu;
  bool tf32;
};

struct Conv2dBackwardArgs {
  DType dtype;
  Conv2dShape shape;
  const void* grad_output;
  const void* input;
  const void* weight;
  void* grad_input;
  void* grad_weight;
  void* grad_bias;
  bool tf32;
};

struct MaxPool2dShape {
  int64_t N, C, H, W;  // input
  int64_t OH, OW;      // output: [N, C, OH, OW]
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  bool channels_last;  // every operand is stored N H W C rather than N C H W

  int64_t taps() const { return kernel_h * kernel_w; }
  // Whether the windows are tiles: they neither overlap nor leave gaps between them, and lie inside the image.
  bool is_tiled() const {
    return kernel_h == stride_h && kernel_w == stride_w && padding_h == 0 && padding_w == 0 && dilation_h == 1 &&
           dilation_w == 1 && OH * kernel_h <= H && OW * kernel_w <= W;
  }
};

// The argmax of a window is the number of the winning tap, i * kernel_w + j: a uint8 where 255 taps suffice, else
// int64.
inline bool max_pool2d_argmax_is_u8(int64_t taps) {
  return taps <= 255;
}

// output = the largest in-bounds tap of the window, argmax = its number. A tap wins if (v > max) || isnan(v):
// ties keep the first, of several NaNs the last one wins; a window of -inf gives its first in-bounds tap.
struct MaxPool2dArgs {
  DType dtype;
  MaxPool2dShape shape;
  const void* input;
  void* output;
  void* argmax;
};

// grad_input[n, c, h, w] = sum of grad_output over the windows whose argmax is that element, in window order,
// rounded once. Argmax values that name no in-bounds tap contribute nothing.
struct MaxPool2dBackwardArgs {
  DType dtype;
  MaxPool2dShape shape;
  const void* grad_output;
  const void* argmax;
  void* grad_input;
};

// output[n, c, y, x] = input at the element the window's argmax names (0 if it names no in-bounds tap): the
// adjoint of the backward, hence the tangent of the forward and the double backward.
struct MaxPool2dGatherArgs {
  DType dtype;
  MaxPool2dShape shape;
  const void* input;
  const void* argmax;
  void* output;
};

// output = relu(max_pool2d(conv2d(input, weight, bias))), in the layout of conv, and the argmax of each window; pool's
// input is conv's output. The maximum of rectified values is the rectified maximum, so only one value per window is
// rectified. Where that maximum is not above 0 (nor NaN), no gradient passes, and the argmax is a number that names no
// tap, dead_window.
struct Conv2dReluMaxPool2dArgs {
  Conv2dArgs conv;  // its output and relu are not looked at
  MaxPool2dShape pool;
  void* output;
  void* argmax;  // null: not wanted
};
inline int64_t dead_window(int64_t taps) {
  return max_pool2d_argmax_is_u8(taps) ? 255 : -1;
}

// The gradients of conv, as max_pool2d_backward followed by conv2d_backward gives them.
struct Conv2dReluMaxPool2dBackwardArgs {
  Conv2dBackwardArgs conv;  // its grad_output is not looked at
  MaxPool2dShape pool;
  const void* grad_output;
  const void* argmax;
};

// indices[n, c, y, x] = h * W + w of the element the window's argmax names (torch's return_indices).
struct MaxPool2dIndicesArgs {
  MaxPool2dShape shape;
  const void* argmax;
  int64_t* indices;
};

// One per device and, on the CPU, per instruction set.
struct Kernels {
  void (*relu)(const ReluArgs&);
  void (*relu_backward)(const ReluBackwardArgs&);
  void (*relu_mask_backward)(const ReluMaskBackwardArgs&);
  void (*linear)(const LinearArgs&);
  void (*linear_backward)(const LinearBackwardArgs&);
  void (*conv2d)(const Conv2dArgs&);
  void (*conv2d_backward)(const Conv2dBackwardArgs&);
  void (*max_pool2d)(const MaxPool2dArgs&);
  void (*max_pool2d_backward)(const MaxPool2dBackwardArgs&);
  void (*max_pool2d_gather)(const MaxPool2dGatherArgs&);
  void (*max_pool2d_indices)(const MaxPool2dIndicesArgs&);
  void (*conv2d_relu_max_pool2d)(const Conv2dReluMaxPool2dArgs&);
  // Returns false, with nothing written, if calling the two backward ops in turn is at least as good. Null if
  // that is always so.
  bool (*conv2d_relu_max_pool2d_backward)(const Conv2dReluMaxPool2dBackwardArgs&);
  bool reads_channels_last_weight;  // else Conv2dShape::weight_channels_last is never set
};

}  // namespace pyops
