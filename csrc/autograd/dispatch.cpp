// The Autograd key of every op that has a derivative: one boxed kernel with three paths, cheapest first.
//
//   - If no derivative is needed, it calls the kernel directly, after a glance at each tensor.
//   - If only a gradient is needed, it adds a node in C++ (node.h) to the graph, which saves what the op's
//     `DerivativeRule` says and calls its backward op.
//   - Anything else (forward mode, an op without a backward in its `DerivativeRule`) calls the op's
//     torch.autograd.Function in Python (pyops/autograd), which states forward, backward, jvp and vmap.
//
// The node exists for speed, because the Function costs more than a small op and its backward. It saves and calls what
// the Function does, except for relu, where it saves a mask of bits instead of the output.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <string>

#include "../checks.h"
#include "node.h"

namespace pyops {
namespace {

using at::Tensor;
using torch::jit::Stack;

// How the backward op of an op is called: (grad_output, kept output, saved inputs, sizes, options, mask), of which each
// may be missing. The options are the op's own arguments after its tensors.
struct DerivativeRule {
  const char* op;
  const char* backward = nullptr;  // null: only the Function in Python knows
  int kept_output = -1;            // the number of the output that is kept; -1: none
  bool bilinear = false;  // inputs are input, weight and bias; input and weight each need the other for their gradient
  enum Sizes { none, image, input_and_weight, output_strides } sizes = none;
  Path path = Path::none;
  const char* forward = nullptr;                 // the op that also computes what is kept; null: the op itself
  const DerivativeRule* in_transform = nullptr;  // the rule inside torch.func's transforms; null: this one
};

// A mask of bits has no dimension to batch over, so the output is kept instead, and must then not be changed in place.
constexpr DerivativeRule relu_in_transform{"relu", "relu_backward", 0};

constexpr DerivativeRule derivatives[] = {
    {"relu", "relu_mask_backward", 1, false, DerivativeRule::output_strides, Path::output, "relu_with_mask",
     &relu_in_transform},
    {"linear", "linear_backward", -1, true},
    {"linear_relu", "linear_relu_backward", 0, true},
    {"conv2d", "conv2d_backward", -1, true, DerivativeRule::input_and_weight, Path::factors},
    {"conv2d_relu", "conv2d_relu_backward", 0, true, DerivativeRule::input_and_weight},
    {"max_pool2d", "max_pool2d_backward", 1, false, DerivativeRule::image, Path::input},
    {"conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward", 1, true, DerivativeRule::input_and_weight,
     Path::output, "conv2d_relu_max_pool2d_with_argmax"},
    {"relu_"},
    {"relu_with_mask"},
    {"relu_backward"},
    {"relu_mask_backward"},
    {"linear_backward"},
    {"linear_batched"},
    {"linear_batched_backward"},
    {"linear_relu_backward"},
    {"conv2d_backward"},
    {"conv2d_relu_backward"},
    {"conv2d_relu_max_pool2d_with_argmax"},
    {"conv2d_relu_max_pool2d_backward"},
    {"max_pool2d_backward"},
    {"max_pool2d_gather"},
};

c10::IValue to_value(c10::SymIntArrayRef numbers) {
  if (const auto known = c10::asIntArrayRefSlowOpt(numbers)) return c10::IValue(*known);
  return c10::IValue(numbers);
}

// An operator by its name, which is looked up at the first call, when all operators are registered.
class NamedOperator {
 public:
  explicit NamedOperator(const char* name) : name_(name) {}

  const c10::OperatorHandle& operator*() const {
    std::call_once(found_, [this] {
      handle_ = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("pyops::") + name_).c_str(), "");
    });
    return *handle_;
  }
  const c10::OperatorHandle* operator->() const { return &**this; }

 private:
  const char* const name_;
  mutable std::once_flag found_;
  mutable std::optional<c10::OperatorHandle> handle_;
};

// Calls an op as a kernel, and attaches a node that differentiates it to the first of its outputs.
class Recorder {
 public:
  explicit Recorder(const DerivativeRule& derivative)
      : derivative_(derivative),
        forward_(derivative.forward ? derivative.forward : derivative.op),
        backward_(derivative.backward) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack,
                  at::ArrayRef<c10::IValue> arguments) const {
    using torch::autograd::collect_next_edges;
    const bool bilinear = derivative_.bilinear;
    const Tensor input = arguments[0].toTensor();
    Tensor weight;
    torch::autograd::edge_list edges;
    if (bilinear) {
      weight = arguments[1].toTensor();
      edges = collect_next_edges(input, weight, arguments[2].toOptional<Tensor>());
    } else {
      edges = collect_next_edges(input);
    }
    const BackwardNode::Pointer node = BackwardNode::make(*backward_, std::move(edges), bilinear, derivative_.path);
    auto& gradient = static_cast<BackwardNode&>(*node);
    if (derivative_.sizes == DerivativeRule::image)  // the kernel refuses an input of fewer dimensions
      gradient.add_option(to_value(input.sym_sizes().slice(std::max<int64_t>(input.dim() - 2, 0))));
    if (derivative_.sizes == DerivativeRule::input_and_weight) {
      gradient.add_option(to_value(input.sym_sizes()));
      gradient.add_option(to_value(weight.sym_sizes()));
    }
    for (const c10::IValue& option : arguments.slice(bilinear ? 3 : 1)) gradient.add_option(option);
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      forward_->redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    }
    const auto outputs = torch::jit::last(*stack, forward_->schema().returns().size());
    const Tensor& output = outputs[0].toTensor();
    torch::autograd::set_history(output, node);
    if (derivative_.sizes == DerivativeRule::output_strides) gradient.add_option(to_value(output.sym_strides()));
    if (const int kept = derivative_.kept_output; kept >= 0) gradient.save(outputs[kept].toTensor(), kept == 0);
    if (bilinear) {
      gradient.save(weight.requires_grad() ? input : Tensor(), false);
      gradient.save(input.requires_grad() ? weight : Tensor(), false);
    }
    torch::jit::drop(*stack, outputs.size() - op.schema().returns().size());
  }

 private:
  const DerivativeRule& derivative_;
  const NamedOperator forward_, backward_;
};

// Never destroyed, because the interpreter may be gone by then.
PyObject* apply_function = nullptr;

bool in_transform() {
  const auto& included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

class AutogradKernel final : public c10::OperatorKernel {
 public:
  explicit AutogradKernel(const DerivativeRule& derivative)
      : differentiable_(derivative.backward != nullptr),
        record_(derivative),
        record_in_transform_(derivative.in_transform ? *derivative.in_transform : derivative) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
    bool wants_gradient = false, wants_tangent = false;
    for (size_t i = 0; i < arguments.size(); ++i) {
      const c10::IValue& argument = arguments[i];
      if (!argument.isTensor()) continue;
      check_defined(op.schema(), i, argument.toTensor());
      wants_gradient |= argument.toTensor().requires_grad();
      wants_tangent |= argument.toTensor()._fw_grad(/*level=*/0).defined();
    }
    wants_gradient &= c10::GradMode::is_enabled();
    if (!wants_gradient && !wants_tangent) {
      at::AutoDispatchBelowAutograd guard;
      op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    } else if (wants_tangent || !differentiable_) {
      call_python(op, stack);
    } else {
      (in_transform() ? record_in_transform_ : record_)(op, keys, stack, arguments);
    }
  }

 private:
  static void call_python(const c10::OperatorHandle& op, Stack* stack) {
    const c10::FunctionSchema& schema = op.schema();
    pybind11::gil_scoped_acquire gil;
    const auto arguments = torch::jit::pop(*stack, schema.arguments().size());
    pybind11::tuple python_arguments(arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) python_arguments[i] = torch::jit::toPyObject(arguments[i]);
    const pybind11::object result = pybind11::handle(apply_function)(schema.name(), python_arguments);
    const auto& returns = schema.returns();
    for (size_t i = 0; i < returns.size(); ++i) {
      pybind11::object value = returns.size() == 1 ? result : result[pybind11::int_(i)];
      stack->push_back(value.is_none() ? c10::IValue(Tensor()) : torch::jit::toIValue(value, returns[i].type()));
    }
  }

  const bool differentiable_;  // by a node in C++
  const Recorder record_, record_in_transform_;
};

// Counts the version of a tensor that an in-place op changes, so that what was saved of it before is known to be stale.
void relu_in_place_counted(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const Tensor input = torch::jit::last(*stack, 1)[0].toTensor();
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

void add_path_here(const pybind11::object& tensor, Path path) {
  Tensor changed = THPVariable_Unpack(tensor.ptr());
  if (const auto node = torch::autograd::get_current_node()) add_path(changed, *node, path);
}

TORCH_LIBRARY_IMPL(pyops, Autograd, m) {
  for (const DerivativeRule& derivative : derivatives)
    m.impl(derivative.op, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<AutogradKernel>(derivative)));
}

TORCH_LIBRARY_IMPL(pyops, ADInplaceOrView, m) {
  m.impl("relu_", torch::CppFunction::makeFromBoxedFunction<&relu_in_place_counted>());
}

}  // namespace pyops
