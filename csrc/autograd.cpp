// The Autograd key of every op, in one boxed kernel with three ways on, cheapest first:
//
//   - nobody wants a derivative: straight to the kernel, at the cost of a glance at each tensor;
//   - somebody wants a gradient, and nothing more: a graph node in C++ that keeps what `Derivative` says and calls the
//     backward op, which is again an op with an Autograd key, so that under create_graph=True its call is recorded too;
//   - anything else (forward mode, torch.func, an op without `Derivative`): the op's torch.autograd.Function in Python
//     (pyops/autograd), which states forward, backward, jvp and vmap.
//
// The node is there for speed: of a call of linear on 8 elements and its backward it takes 9 us, the Function 31. It
// saves and calls the same as the Function, but for relu, of which it saves a mask of bits instead of the output.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/library.h>

#include "checks.h"
#include "device.h"

namespace pyops {

// What the nodes of the graph are named by: grad_fn.name() is
// torch::autograd::CppNode<pyops::Gradient<pyops::op::relu>>.
namespace op {
struct relu;
struct linear;
struct linear_relu;
struct conv2d;
struct conv2d_relu;
struct conv2d_relu_max_pool2d;
struct max_pool2d;
}  // namespace op

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

// How the backward op of an op is called: (grad_output, kept output, saved inputs, sizes, options, mask), of which each
// may be missing. The options are the op's own arguments after its tensors.
struct Derivative;
template <class Op>
variable_list record(const Derivative& derivative, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                     Stack* stack, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias);

struct Derivative {
  const char* op;
  decltype(&record<op::relu>) record = nullptr;  // null: the Function in Python alone knows
  const char* backward = nullptr;
  int kept_output = -1;   // the number of the output that is kept, -1: none
  bool bilinear = false;  // inputs are input, weight and bias; the gradient of each of the former needs the other
  enum Sizes { none, image, input_and_weight, output_strides } sizes = none;
  const char* forward = nullptr;  // the op that computes what is kept too; null: the op itself does
};

constexpr Derivative derivatives[] = {
    {"relu", record<op::relu>, "relu_mask_backward", 1, false, Derivative::output_strides, "relu_with_mask"},
    {"linear", record<op::linear>, "linear_backward", -1, true},
    {"linear_relu", record<op::linear_relu>, "linear_relu_backward", 0, true},
    {"conv2d", record<op::conv2d>, "conv2d_backward", -1, true, Derivative::input_and_weight},
    {"conv2d_relu", record<op::conv2d_relu>, "conv2d_relu_backward", 0, true, Derivative::input_and_weight},
    {"max_pool2d", record<op::max_pool2d>, "max_pool2d_backward", 1, false, Derivative::image},
    {"conv2d_relu_max_pool2d", record<op::conv2d_relu_max_pool2d>, "conv2d_relu_max_pool2d_backward", 1, true,
     Derivative::input_and_weight, "conv2d_relu_max_pool2d_with_argmax"},
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
    {"max_pool2d_indices"},
};

c10::IValue to_value(c10::SymIntArrayRef numbers) {
  if (const auto known = c10::asIntArrayRefSlowOpt(numbers)) return c10::IValue(*known);
  return c10::IValue(numbers);
}

c10::OperatorHandle find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow((std::string("pyops::") + name).c_str(), "");
}

// The derivative by the input of a gradient that depends on which elements of it are the largest, or positive, and on
// nothing else of it: zeros, as stock has them, where there would be no path in the graph.
struct Zeros : torch::autograd::Node {
  variable_list apply(variable_list&& grads) override {
    return {grads[0].defined() ? at::zeros_like(grads[0]) : Tensor()};
  }
};

// To be called from the backward of the node whose first input that is.
void connect_to_input(const Tensor& grad_input) {
  using torch::autograd::Node;
  const auto current = torch::autograd::get_current_node();
  if (!current || grad_input.requires_grad()) return;
  // A std::shared_ptr or a c10::intrusive_ptr, as the version of torch has it.
  const std::remove_const_t<decltype(current)> zeros(std::unique_ptr<Node>(new Zeros));
  zeros->add_next_edge(current->next_edge(0));
  torch::autograd::create_gradient_edge(const_cast<Tensor&>(grad_input), zeros);
}

}  // namespace

// The graph node. What it keeps besides tensors is one list: its derivative, the number of its inputs, sizes, options.
template <class Op>
struct Gradient : torch::autograd::Function<Gradient<Op>> {
  // The tensors are those of the op's arguments, which are taken from the stack.
  static variable_list forward(AutogradContext* ctx, const Derivative& derivative, const c10::OperatorHandle& op,
                               c10::DispatchKeySet keys, Stack* stack, const Tensor& input,
                               const OptionalTensor& weight, const OptionalTensor& bias) {
    auto rest = c10::impl::GenericList(c10::AnyType::get());
    rest.push_back(reinterpret_cast<int64_t>(&derivative));
    rest.push_back(derivative.bilinear ? 2 + int64_t{bias.has_value()} : 1);
    if (derivative.sizes == Derivative::image) rest.push_back(to_value(input.sym_sizes().slice(input.dim() - 2)));
    if (derivative.sizes == Derivative::input_and_weight)
      rest.push_back(to_value(input.sym_sizes())), rest.push_back(to_value(weight->sym_sizes()));
    const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
    for (const c10::IValue& option : arguments.slice(derivative.bilinear ? 3 : 1)) rest.push_back(option);
    static const c10::OperatorHandle forward_op = derivative.forward ? find_op(derivative.forward) : op;
    {
      at::AutoDispatchBelowAutograd guard;
      forward_op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    }
    variable_list outputs, kept;
    for (c10::IValue& output : torch::jit::pop(*stack, forward_op.schema().returns().size()))
      outputs.push_back(std::move(output).toTensor());
    if (derivative.sizes == Derivative::output_strides) rest.push_back(to_value(outputs[0].sym_strides()));
    ctx->saved_data["rest"] = std::move(rest);
    ctx->set_materialize_grads(false);
    if (derivative.kept_output >= 0) kept.push_back(outputs[derivative.kept_output]);
    if (derivative.bilinear) {
      kept.push_back(weight->requires_grad() ? input : Tensor());
      kept.push_back(input.requires_grad() ? *weight : Tensor());
    }
    ctx->save_for_backward(std::move(kept));
    outputs.resize(op.schema().returns().size());
    if (outputs.size() == 2) ctx->mark_non_differentiable({outputs[1]});
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto rest = ctx->saved_data["rest"].toListRef();
    const auto& derivative = *reinterpret_cast<const Derivative*>(rest[0].toInt());
    const int64_t inputs = rest[1].toInt();
    // As many as forward has arguments; those that are no tensors have none.
    variable_list results(7);
    if (!grads[0].defined()) return results;
    variable_list saved = ctx->get_saved_variables();
    Stack stack;
    stack.reserve(1 + saved.size() + rest.size());
    stack.emplace_back(grads[0]);
    for (Tensor& tensor : saved) stack.push_back(tensor.defined() ? c10::IValue(std::move(tensor)) : c10::IValue());
    stack.insert(stack.end(), rest.begin() + 2, rest.end());
    if (derivative.bilinear) {
      c10::List<bool> mask;
      for (int64_t i = 0; i < 3; ++i) mask.push_back(i < inputs && ctx->needs_input_grad(i));
      stack.emplace_back(std::move(mask));
    }
    static const c10::OperatorHandle backward_op = find_op(derivative.backward);
    backward_op.callBoxed(stack);
    for (int64_t i = 0; i < inputs; ++i) results[4 + i] = std::move(stack[i]).toTensor();
    if (c10::GradMode::is_enabled() && !derivative.bilinear) connect_to_input(results[4]);
    return results;
  }
};

namespace {

template <class Op>
variable_list record(const Derivative& derivative, const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                     Stack* stack, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) {
  return Gradient<Op>::apply(derivative, op, keys, stack, input, weight, bias);
}

// Never destroyed: the interpreter may be gone by then.
PyObject* apply_function = nullptr;

bool in_transform() {
  const auto& included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

class AutogradKernel final : public c10::OperatorKernel {
 public:
  explicit AutogradKernel(const Derivative& derivative) : derivative_(derivative) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
    const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
    bool wants_gradient = false, wants_tangent = false;
    for (const c10::IValue& argument : arguments) {
      if (!argument.isTensor() || !argument.toTensor().defined()) continue;
      wants_gradient |= argument.toTensor().requires_grad();
      wants_tangent |= argument.toTensor()._fw_grad(/*level=*/0).defined();
    }
    wants_gradient &= c10::GradMode::is_enabled();
    if (!wants_gradient && !wants_tangent) {
      at::AutoDispatchBelowAutograd guard;
      op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
    } else if (wants_tangent || derivative_.record == nullptr || in_transform()) {
      call_python(op, stack);
    } else {
      record(op, keys, stack, arguments);
    }
  }

 private:
  void record(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack,
              at::ArrayRef<c10::IValue> arguments) const {
    const Tensor input = arguments[0].toTensor();
    OptionalTensor weight, bias;
    if (derivative_.bilinear) weight = arguments[1].toTensor(), bias = arguments[2].toOptional<Tensor>();
    const variable_list outputs = derivative_.record(derivative_, op, keys, stack, input, weight, bias);
    for (const Tensor& output : outputs) stack->emplace_back(output);
  }

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

  const Derivative& derivative_;
};

// Version counters and views, for an in-place op: what was saved of the tensor before is known to be stale.
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

TORCH_LIBRARY_IMPL(pyops, Autograd, m) {
  for (const Derivative& derivative : derivatives)
    m.impl(derivative.op, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<AutogradKernel>(derivative)));
}

TORCH_LIBRARY_IMPL(pyops, ADInplaceOrView, m) {
  m.impl("relu_", torch::CppFunction::makeFromBoxedFunction<&relu_in_place_counted>());
}

}  // namespace pyops
