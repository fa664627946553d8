// The node that a call of an op adds to the autograd graph.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <string>
#include <vector>

namespace pyops {

// Stock's graph connects a gradient to some operands of the op that our backward op does not take, although the
// derivatives with respect to them are zero or undefined. This says which operands these are.
enum class Path {
  none,     // the operands of the backward op are all there are
  factors,  // input and weight, with an undefined derivative: every gradient requires grad if they do
  input,    // input, with a derivative of zeros, because which elements are the largest is locally constant
  output,   // the output, likewise; it also selects the elements of the derivative by grad_output
};

// Adds paths to the operands that `path` names, of the op that `node` differentiates, to the history of `tensor`. The
// tensor is a copy of grad_output if the operand is the output, otherwise a gradient that no other tensor shares yet.
void add_path(at::Tensor& tensor, torch::autograd::Node& node, Path path);

// The backward of this node calls the operator `backward` on
//
//   grad_output, the saved tensors, the options[, a mask: which gradients are needed]
//
// which returns the gradients of the op's inputs, one for each edge of the node; a gradient that is not needed may be
// undefined. The operator has an Autograd key itself, so its call is recorded too under create_graph=True.
//
// The node does what the nodes that torch generates for its own ops do: it honours hooks on saved tensors, refuses a
// second backward after the first one freed them, and can be traced by compiled autograd. A torch::autograd::Function
// would do the same, but it serves any number of inputs and outputs, which costs as much time as a small op.
class BackwardNode final : public torch::autograd::Node {
 public:
  using Pointer = decltype(torch::autograd::Edge::function);  // std::shared_ptr, from torch 2.13 on c10::intrusive_ptr

  // The edges lead to the nodes that the inputs come from.
  static Pointer make(const c10::OperatorHandle& backward, torch::autograd::edge_list edges, bool masked, Path path);

  void add_option(c10::IValue option) { options_.push_back(std::move(option)); }
  // `output` means that the node differentiates this tensor, which must then know the node already.
  void save(const at::Tensor& tensor, bool output) { saved_.emplace_back(tensor, output); }

  std::string name() const override { return backward_.schema().name(); }
  void release_variables() override;
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& key) const override;
  torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& grads,
                                                  torch::dynamo::autograd::SwapSavedVariables& saved) override;

 private:
  BackwardNode(const c10::OperatorHandle& backward, torch::autograd::edge_list edges, bool masked, Path path);
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
  std::vector<c10::IValue> arguments();

  const c10::OperatorHandle backward_;
  const bool masked_;
  const Path path_;
  std::vector<torch::autograd::SavedVariable> saved_;
  std::vector<c10::IValue> options_;
};

}  // namespace pyops
