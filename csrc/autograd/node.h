// The node of autograd's graph that a call of an op leaves.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <string>
#include <vector>

namespace pyops {

// On which operands of an op stock's gradients depend without being told so by the operands of our backward op. Their
// derivative by these is known beforehand, and yet there is a path to them in the graph.
enum class Path {
  none,     // the operands of the backward op tell all
  factors,  // on input and weight, by a derivative that is undefined, and so every gradient requires grad if they do
  input,    // on input, by a derivative of zeros: which elements are the largest is constant all around it
  output,   // on the output, likewise; and so does the derivative by grad_output, which is selected by it again
};

// Adds to the history of `tensor` a path to the operands that `path` names, of the op that `node` differentiates. The
// tensor is a copy of grad_output where these are the output, else a gradient that no other tensor shares yet.
void add_path(at::Tensor& tensor, torch::autograd::Node& node, Path path);

// Its backward calls the operator `backward` on
//
//   grad_output, the saved tensors, the options[, a mask: which gradients are needed]
//
// which returns the gradients of the op's inputs, one for each edge of the node; where nobody needs one, it may be
// undefined. The operator has an Autograd key itself, so that under create_graph=True its call is recorded too.
//
// The node does what the nodes that torch generates for its own ops do: it honours hooks on saved tensors, refuses a
// second backward after the first freed them, and can be traced by compiled autograd. A torch::autograd::Function,
// which serves any number of inputs and outputs, does the same 1 us slower, as long as a small op takes.
class BackwardNode final : public torch::autograd::Node {
 public:
  using Pointer = decltype(torch::autograd::Edge::function);  // std::shared_ptr, from torch 2.13 on c10::intrusive_ptr

  // The edges lead to where the inputs come from.
  static Pointer make(const c10::OperatorHandle& backward, torch::autograd::edge_list edges, bool masked, Path path);

  void add_option(c10::IValue option) { options_.push_back(std::move(option)); }
  // `output`: it is the tensor that the node differentiates, which must know the node already.
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
