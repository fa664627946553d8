// Autocast: under torch.autocast, linear and conv2d run in the autocast dtype, as stock's do; relu and max_pool2d in
// the dtype they are given, for which torch needs no registration.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "checks.h"

namespace pyops {
namespace {

using at::Tensor;

// Casts arguments as stock's "lower_precision_fp" ops do: floating tensors of that device, weights once per region.
class Cast {
 public:
  explicit Cast(const Tensor& like)
      : device_(like.device().type()), dtype_(at::autocast::get_autocast_dtype(device_)) {}
  Tensor operator()(const Tensor& tensor) const { return at::autocast::cached_cast(dtype_, tensor, device_); }
  OptionalTensor operator()(const OptionalTensor& tensor) const {
    return tensor.has_value() ? OptionalTensor((*this)(*tensor)) : tensor;
  }

 private:
  c10::DeviceType device_;
  at::ScalarType dtype_;
};

template <c10::DispatchKey key>
Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyops::linear", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const Cast cast(input);
  return op.call(cast(input), cast(weight), cast(bias));
}

template <c10::DispatchKey key>
Tensor conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, at::IntArrayRef stride,
              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("pyops::conv2d", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, at::IntArrayRef,
                                           at::IntArrayRef, at::IntArrayRef, int64_t)>();
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const Cast cast(input);
  return op.call(cast(input), cast(weight), cast(bias), stride, padding, dilation, groups);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyops, AutocastCPU, m) {
  m.impl("linear", linear<c10::DispatchKey::AutocastCPU>);
  m.impl("conv2d", conv2d<c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(pyops, AutocastCUDA, m) {
  m.impl("linear", linear<c10::DispatchKey::AutocastCUDA>);
  m.impl("conv2d", conv2d<c10::DispatchKey::AutocastCUDA>);
}

}  // namespace pyops
