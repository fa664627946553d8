#include "gradient.h"

#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <type_traits>

namespace pyops {

using at::Tensor;
using c10::IValue;
using torch::autograd::Node;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

namespace {

// As torch's own nodes are held: a long graph is freed without recursion.
template <class Pointer = Gradient::Pointer>
Pointer hold(Node* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return Pointer(node, [](auto* dead) { deleteNode(dead); });
  else
    return Pointer(std::unique_ptr<Node>(node));
}

// For compiled autograd: instead of what `node` computes, a call of `apply` on the gradients and the arguments.
variable_list trace(const Node& node, const variable_list& grads, const SwapSavedVariables& saved,
                    const std::vector<IValue>& arguments, std::vector<at::TypePtr> types,
                    torch::dynamo::autograd::functional_apply_t apply) {
  using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
  const Metadata metadata = torch::dynamo::autograd::get_input_metadata(node.next_edges());
  const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
  const std::string function =
      compiler->bind_function(saved.get_py_compiler(), node.name(), std::move(apply), std::move(types),
                              /*is_custom_function=*/true, /*is_traceable=*/true);
  return compiler->call_function(saved.get_py_compiler(), "apply_functional", function, grads, arguments,
                                 torch::dynamo::autograd::IValuePacker<Metadata>::pack(metadata));
}

// The derivative by the input of a gradient that depends on which elements of it are the largest, or positive, and on
// nothing else of it: zeros, as stock has them, where there would be no path in the graph.
struct Zeros : Node {
  explicit Zeros(const torch::autograd::Edge& input) { add_next_edge(input); }

  std::string name() const override { return "pyops::zeros"; }
  variable_list apply(variable_list&& grads) override { return zeros(grads); }
  void compiled_args(CompiledNodeArgs& key) const override { key.collect(name()); }
  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) override {
    return trace(*this, grads, saved, {}, {}, [](const variable_list& of, const auto&) { return zeros(of); });
  }

 private:
  static variable_list zeros(const variable_list& grads) {
    return {grads[0].defined() ? at::zeros_like(grads[0]) : Tensor()};
  }
};

variable_list call(const c10::OperatorHandle& backward, const Tensor& grad_output, std::vector<IValue> rest) {
  rest.insert(rest.begin(), grad_output);
  backward.callBoxed(rest);
  variable_list gradients;
  gradients.reserve(rest.size());
  for (IValue& gradient : rest) gradients.push_back(std::move(gradient).toTensor());
  return gradients;
}

}  // namespace

Gradient::Pointer Gradient::make(const c10::OperatorHandle& backward, torch::autograd::edge_list edges, bool masked) {
  return hold(new Gradient(backward, std::move(edges), masked));
}

Gradient::Gradient(const c10::OperatorHandle& backward, torch::autograd::edge_list edges, bool masked)
    : Node(std::move(edges)), backward_(backward), masked_(masked) {
  saved_.reserve(3);
  options_.reserve(backward.schema().arguments().size());
}

// What the operator takes besides grad_output.
std::vector<IValue> Gradient::arguments() {
  std::vector<IValue> arguments;
  arguments.reserve(backward_.schema().arguments().size());
  for (const auto& saved : saved_) {
    Tensor tensor = saved.unpack(getptr());
    arguments.push_back(tensor.defined() ? IValue(std::move(tensor)) : IValue());
  }
  arguments.insert(arguments.end(), options_.begin(), options_.end());
  if (masked_) {
    c10::List<bool> mask;
    mask.reserve(num_outputs());
    for (size_t i = 0; i < num_outputs(); ++i) mask.push_back(task_should_compute_output(i));
    arguments.emplace_back(std::move(mask));
  }
  return arguments;
}

variable_list Gradient::apply(variable_list&& grads) {
  if (!grads[0].defined()) return variable_list(num_outputs());
  const std::lock_guard<std::mutex> lock(mutex_);
  variable_list gradients = call(backward_, grads[0], arguments());
  // A product depends on its factors; what only selects elements, the operators without a mask, does not.
  if (c10::GradMode::is_enabled() && !masked_ && !gradients[0].requires_grad())
    torch::autograd::create_gradient_edge(gradients[0], hold(new Zeros(next_edge(0))));
  return gradients;
}

void Gradient::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& saved : saved_) saved.reset_data();
}

void Gradient::compiled_args(CompiledNodeArgs& key) const {
  key.collect(name());
  key.collect(saved_, /*is_output=*/true);  // they are unpacked for this node, as in arguments()
  // Numbers become a part of the key, not inputs of the graph.
  for (const IValue& option : options_) key.collect(option, /*nested=*/true);
}

variable_list Gradient::apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) {
  if (!grads[0].defined()) return variable_list(num_outputs());
  std::vector<at::TypePtr> types;
  for (const c10::Argument& argument : at::ArrayRef(backward_.schema().arguments()).slice(1))
    types.push_back(argument.type());
  saved.before(saved_);
  variable_list gradients = trace(*this, grads, saved, arguments(), std::move(types),
                                  [backward = backward_](const variable_list& of, const std::vector<IValue>& rest) {
                                    return call(backward, of[0], rest);
                                  });
  saved.after(saved_);
  return gradients;
}

}  // namespace pyops
