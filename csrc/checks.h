// Argument checks and layout decisions shared by the ops. A failed check raises what stock torch raises, with the op,
// the rule and the values in the message. Every check runs before anything is allocated or written.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/function_schema.h>
#include <c10/util/StringUtil.h>

#include <limits>
#include <optional>

#include "kernels.h"

namespace pyops {

using OptionalTensor = std::optional<at::Tensor>;

// The kernels' name of a floating dtype (float32, float64, bfloat16, float16); raises NotImplementedError for any
// other.
inline DType floating_dtype(const char* op, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kBFloat16:
      return DType::bf16;
    case at::kHalf:
      return DType::f16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"", op, "\" not implemented for '", tensor.scalar_type(), "'");
  }
}

// The kernels' name of a floating dtype or of an integer dtype that stock's relu and max_pool2d accept.
inline DType real_dtype(const char* op, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kByte:
      return DType::u8;
    case at::kChar:
      return DType::i8;
    case at::kShort:
      return DType::i16;
    case at::kInt:
      return DType::i32;
    case at::kLong:
      return DType::i64;
    default:
      return floating_dtype(op, tensor);
  }
}

// If an argument that is not optional is None, torch passes an undefined tensor.
inline void check_defined(const c10::FunctionSchema& op, size_t position, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), op.name(), "(): argument '", op.arguments()[position].name(), "' (position ",
                   position + 1, ") must be Tensor, not None");
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& tensor, const char* other_name,
                              const at::Tensor& other) {
  TORCH_CHECK(tensor.device() == other.device(), op, ": expected all tensors to be on the same device, but got ", name,
              " on ", tensor.device(), " and ", other_name, " on ", other.device());
}

// Checks that `tensor` and `other` have the same device and dtype.
inline void check_same_kind(const char* op, const char* name, const at::Tensor& tensor, const char* other_name,
                            const at::Tensor& other) {
  check_same_device(op, name, tensor, other_name, other);
  TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), op, ": ", name, " and ", other_name,
              " must have the same dtype, their types should be the same (got ", name, "=", tensor.scalar_type(), ", ",
              other_name, "=", other.scalar_type(), ")");
}

inline void check_shape(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK(tensor.sizes() == expected, op, ": expected ", name, " of shape ", expected, ", but got ",
              tensor.sizes());
}

// Sizes, strides, paddings and dilations stay below 2^31, so that no sum or product of two of them overflows.
inline void check_magnitude(const char* op, const char* name, at::IntArrayRef values) {
  for (const int64_t value : values)
    TORCH_CHECK(value <= std::numeric_limits<int32_t>::max(), op, ": ", name, " is too large, got ", name, "=", values);
}

struct Pair {
  int64_t h, w;
};

inline bool is_channels_last(const at::Tensor& tensor) {
  return tensor.dim() == 4 && tensor.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
}
inline at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Turns an unbatched image into a batch of one, and back.
inline at::Tensor to_batch(const at::Tensor& images) {
  return images.dim() == 3 ? images.unsqueeze(0) : images;
}
inline at::Tensor from_batch(const at::Tensor& images, bool batched) {
  // Autograd must not see a view here, because it would refuse to change it in place.
  const at::AutoDispatchBelowADInplaceOrView guard;
  return batched ? images : images.squeeze(0);
}

// Whether a result has values to compute. It has none on the meta device, where an operator is run for its checks and
// the sizes of its results (csrc/autograd/fast_call.cpp).
inline bool to_compute(const at::Tensor& result) {
  return result.numel() > 0 && !result.is_meta();
}

inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() && !tensor->is_meta() ? tensor->const_data_ptr() : nullptr;
}
inline void* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() && !tensor.is_meta() ? tensor.mutable_data_ptr() : nullptr;
}

}  // namespace pyops
