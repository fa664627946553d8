// The Autograd key of every op, in one boxed function: a call for which nobody wants a derivative goes straight to the
// kernel, at the cost of a glance at each tensor; any other goes to the op's torch.autograd.Function in Python
// (pyops/autograd), which states forward, backward and jvp once. So torch.ops.pyops.* are differentiable themselves.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/library.h>

#include "device.h"

namespace pyops {
namespace {

// Never destroyed: the interpreter may be gone by then.
PyObject* apply_function = nullptr;

bool wants_derivative(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const bool grad_mode = c10::GradMode::is_enabled();
  for (const c10::IValue& argument : torch::jit::last(stack, op.schema().arguments().size())) {
    if (!argument.isTensor()) continue;
    const at::Tensor& tensor = argument.toTensor();
    if (!tensor.defined()) continue;
    if ((grad_mode && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined()) return true;
  }
  return false;
}

void autograd(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (!wants_derivative(op, *stack)) {
    at::AutoDispatchBelowAutograd guard;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    return;
  }
  const c10::FunctionSchema& schema = op.schema();
  pybind11::gil_scoped_acquire gil;
  const auto arguments = torch::jit::pop(*stack, schema.arguments().size());
  pybind11::tuple python_arguments(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) python_arguments[i] = torch::jit::toPyObject(arguments[i]);
  const pybind11::object result = pybind11::handle(apply_function)(schema.name(), python_arguments);
  const auto& returns = schema.returns();
  for (size_t i = 0; i < returns.size(); ++i) {
    pybind11::object value = returns.size() == 1 ? result : result[pybind11::int_(i)];
    stack->push_back(value.is_none() ? c10::IValue(at::Tensor()) : torch::jit::toIValue(value, returns[i].type()));
  }
}

// Version counters and views, for an in-place op: what was saved of the tensor before is known to be stale.
void relu_in_place_counted(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const at::Tensor input = torch::jit::last(*stack, 1)[0].toTensor();
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  torch::autograd::impl::bump_version(input);
}

}  // namespace

void set_autograd(pybind11::object function) {
  apply_function = function.release().ptr();
}

TORCH_LIBRARY_IMPL(pyops, Autograd, m) {
  for (const char* op :
       {"relu", "relu_", "relu_backward", "linear", "linear_backward", "conv2d", "conv2d_backward", "max_pool2d",
        "max_pool2d_backward", "max_pool2d_gather", "max_pool2d_indices", "linear_relu", "linear_relu_backward",
        "conv2d_relu", "conv2d_relu_backward", "conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"})
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&autograd>());
}

TORCH_LIBRARY_IMPL(pyops, ADInplaceOrView, m) {
  m.impl("relu_", torch::CppFunction::makeFromBoxedFunction<&relu_in_place_counted>());
}

}  // namespace pyops
