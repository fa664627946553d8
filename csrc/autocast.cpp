// Autocast: under torch.autocast, linear and conv2d, and the fused ops made of them, run in the autocast dtype, as
// stock's do. relu and max_pool2d run in the dtype that they are given, which needs no registration.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "checks.h"

namespace pyops {
namespace {

using at::Tensor;

// Casts arguments as stock's "lower_precision_fp" ops do: floating tensors of that device, and weights once per region.
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

// Calls the op named `name`, whose first arguments are input, weight and bias, with those cast to the autocast dtype.
template <c10::DispatchKey key, class Result, class... Options>
struct InLowerPrecision {
  template <const char* const& name>
  static Result call(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Options... options) {
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow(name, "")
            .template typed<Result(const Tensor&, const Tensor&, const OptionalTensor&, Options...)>();
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Cast cast(input);
    return op.call(cast(input), cast(weight), cast(bias), options...);
  }
};

constexpr const char* linear = "pyops::linear";
constexpr const char* linear_relu = "pyops::linear_relu";
constexpr const char* linear_batched = "pyops::linear_batched";
constexpr const char* conv2d = "pyops::conv2d";
constexpr const char* conv2d_relu = "pyops::conv2d_relu";
constexpr const char* conv2d_relu_max_pool2d = "pyops::conv2d_relu_max_pool2d";
constexpr const char* conv2d_relu_max_pool2d_with_argmax = "pyops::conv2d_relu_max_pool2d_with_argmax";

using Ints = at::IntArrayRef;

template <c10::DispatchKey key, class Result>
using Pooled = InLowerPrecision<key, Result, Ints, Ints, Ints, int64_t, Ints, Ints, Ints, Ints, bool>;

template <c10::DispatchKey key>
void implement(torch::Library& m) {
  using Linear = InLowerPrecision<key, Tensor>;
  using Conv2d = InLowerPrecision<key, Tensor, Ints, Ints, Ints, int64_t>;
  m.impl("linear", &Linear::template call<linear>);
  m.impl("linear_relu", &Linear::template call<linear_relu>);
  m.impl("linear_batched", &Linear::template call<linear_batched>);
  m.impl("conv2d", &Conv2d::template call<conv2d>);
  m.impl("conv2d_relu", &Conv2d::template call<conv2d_relu>);
  m.impl("conv2d_relu_max_pool2d", &Pooled<key, Tensor>::template call<conv2d_relu_max_pool2d>);
  m.impl("conv2d_relu_max_pool2d_with_argmax",
         &Pooled<key, std::tuple<Tensor, Tensor>>::template call<conv2d_relu_max_pool2d_with_argmax>);
}

}  // namespace

TORCH_LIBRARY_IMPL(pyops, AutocastCPU, m) {
  implement<c10::DispatchKey::AutocastCPU>(m);
}

TORCH_LIBRARY_IMPL(pyops, AutocastCUDA, m) {
  implement<c10::DispatchKey::AutocastCUDA>(m);
}

}  // namespace pyops
