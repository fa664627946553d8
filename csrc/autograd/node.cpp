#include "node.h"

#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
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

// Holds a node as torch holds its own, so that a long graph is freed without recursion.
template <class Pointer = BackwardNode::Pointer>
Pointer hold(Node* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return Pointer(node, [](auto* dead) { deleteNode(dead); });
  else
    return Pointer(std::unique_ptr<Node>(node));
}

// For compiled autograd: records a call of `apply` on the gradients and the arguments in place of what `node` computes.
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

// A node between a tensor and its history that adds paths to operands, of which it has only the edges.
class PathNode final : public Node {
 public:
  PathNode(torch::autograd::edge_list history_and_operands, Path path)
      : Node(std::move(history_and_operands)), path_(path) {}

  std::string name() const override { return "pyops::path"; }
  variable_list apply(variable_list&& grads) override;
  void compiled_args(CompiledNodeArgs& key) const override {
    key.collect(name());
    key.collect(static_cast<uint8_t>(path_));
  }
  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) override {
    // What a traced call returns is taken for a tensor, but these derivatives are undefined.
    if (path_ == Path::factors) return derivatives(grads[0], num_outputs() - 1, path_);
    return trace(*this, grads, saved, {}, {},
                 [path = path_, operands = num_outputs() - 1](const auto& of, const auto&) {
                   return derivatives(of[0], operands, path);
                 });
  }

 private:
  static variable_list derivatives(const Tensor& grad, size_t operands, Path path) {
    variable_list result(1 + operands);
    if (!grad.defined()) return result;
    result[0] = grad;
    if (path != Path::factors) std::fill(result.begin() + 1, result.end(), at::zeros_like(grad));
    return result;
  }

  const Path path_;
};

void add_operands(Tensor& tensor, at::ArrayRef<torch::autograd::Edge> operands, Path path) {
  torch::autograd::edge_list edges = torch::autograd::collect_next_edges(tensor);
  edges.insert(edges.end(), operands.begin(), operands.end());
  torch::autograd::create_gradient_edge(tensor, hold(new PathNode(std::move(edges), path)));
}

variable_list PathNode::apply(variable_list&& grads) {
  variable_list result = derivatives(grads[0], num_outputs() - 1, path_);
  if (path_ == Path::output && c10::GradMode::is_enabled() && result[0].defined()) {
    result[0] = result[0].clone();  // other tensors share it
    add_operands(result[0], at::ArrayRef(next_edges()).slice(1), path_);
  }
  return result;
}

variable_list call(const c10::OperatorHandle& backward, const Tensor& grad_output, std::vector<IValue> rest) {
  rest.insert(rest.begin(), grad_output);
  backward.callBoxed(rest);
  variable_list gradients;
  gradients.reserve(rest.size());
  for (IValue& gradient : rest) gradients.push_back(std::move(gradient).toTensor());
  return gradients;
}

}  // namespace

void add_path(Tensor& tensor, Node& node, Path path) {
  torch::autograd::edge_list operands;
  if (path == Path::output) operands.emplace_back(node.getptr(), 0);
  if (path == Path::input || path == Path::factors) operands.push_back(node.next_edge(0));
  if (path == Path::factors) operands.push_back(node.next_edge(1));
  const bool any = std::any_of(operands.begin(), operands.end(), [](const auto& edge) { return edge.is_valid(); });
  if (any) add_operands(tensor, operands, path);
}

BackwardNode::Pointer BackwardNode::make(const c10::OperatorHandle& backward, torch::autograd::edge_list edges,
                                         bool masked, Path path) {
  return hold(new BackwardNode(backward, std::move(edges), masked, path));
}

BackwardNode::BackwardNode(const c10::OperatorHandle& backward, torch::autograd::edge_list edges, bool masked,
                           Path path)
    : Node(std::move(edges)), backward_(backward), masked_(masked), path_(path) {
  saved_.reserve(3);
  options_.reserve(backward.schema().arguments().size());
}

// The arguments of the operator after grad_output.
std::vector<IValue> BackwardNode::arguments() {
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

variable_list BackwardNode::apply(variable_list&& grads) {
  if (!grads[0].defined()) return variable_list(num_outputs());
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!c10::GradMode::is_enabled()) return call(backward_, grads[0], arguments());
  Tensor grad_output = grads[0];
  if (path_ == Path::output) add_path(grad_output = grad_output.clone(), *this, path_);
  variable_list gradients = call(backward_, grad_output, arguments());
  if (path_ == Path::input || path_ == Path::factors)
    for (Tensor& gradient : gradients)
      if (gradient.defined()) add_path(gradient, *this, path_);
  return gradients;
}

void BackwardNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& saved : saved_) saved.reset_data();
}

void BackwardNode::compiled_args(CompiledNodeArgs& key) const {
  key.collect(name());
  key.collect(saved_, /*is_output=*/true);  // they are unpacked for this node, as in arguments()
  // Numbers become part of the key, not inputs of the graph.
  for (const IValue& option : options_) key.collect(option, /*nested=*/true);
}

variable_list BackwardNode::apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) {
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
