// Calls operators from Python without torch's argument matching. Arguments that are plain tensors, numbers, lists of
// numbers or None go straight onto the dispatcher's stack. Anything else (subclasses, modes that override functions,
// symbols, keywords) falls back to torch's own call of an operator, which matches any arguments with any schema and
// whose overhead is as large as the run time of a small kernel.
//
// It also calls an operator for its checks alone, which the fake kernels and the batching rules (pyops/autograd) do
// before they look at their arguments.
#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../checks.h"

namespace pyops {
namespace {

enum class Kind { tensor, optional_tensor, integer, int_list, boolean, other };

struct Parameter {
  Kind kind;
  int64_t length;  // length of a list that one number can stand for; 0: it cannot
};

struct Operator {
  c10::OperatorHandle handle;
  PyObject* of_torch;  // the torch._ops.OpOverload; never destroyed, as the operators of torch.ops are not
  std::vector<Parameter> parameters;
};

Parameter parameter_of(const c10::Argument& argument) {
  const c10::Type& type = *argument.type();
  switch (type.kind()) {
    case c10::TypeKind::TensorType:
      return {Kind::tensor, 0};
    case c10::TypeKind::IntType:
      return {Kind::integer, 0};
    case c10::TypeKind::BoolType:
      return {Kind::boolean, 0};
    case c10::TypeKind::OptionalType:
      if (type.containedType(0)->kind() == c10::TypeKind::TensorType) return {Kind::optional_tensor, 0};
      return {Kind::other, 0};
    case c10::TypeKind::ListType:
      if (type.containedType(0)->kind() == c10::TypeKind::IntType) return {Kind::int_list, argument.N().value_or(0)};
      return {Kind::other, 0};
    default:
      return {Kind::other, 0};
  }
}

bool to_integer(PyObject* object, int64_t& number) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  number = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0;
}

// Appends the argument; false if torch has to handle it.
bool push(std::vector<c10::IValue>& stack, PyObject* object, const Parameter& parameter) {
  int64_t number = 0;
  switch (parameter.kind) {
    case Kind::optional_tensor:
      if (object == Py_None) return stack.emplace_back(), true;
      [[fallthrough]];
    case Kind::tensor:
      if (!THPVariable_CheckExact(object)) return false;
      stack.emplace_back(THPVariable_Unpack(object));
      return true;
    case Kind::integer:
      if (!to_integer(object, number)) return false;
      stack.emplace_back(number);
      return true;
    case Kind::boolean:
      if (!PyBool_Check(object)) return false;
      stack.emplace_back(object == Py_True);
      return true;
    case Kind::int_list: {
      c10::List<int64_t> numbers;
      if (to_integer(object, number)) {
        if (parameter.length == 0) return false;
        for (int64_t i = 0; i < parameter.length; ++i) numbers.push_back(number);
      } else {
        if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return false;
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(object); ++i) {
          if (!to_integer(PySequence_Fast_GET_ITEM(object, i), number)) return false;
          numbers.push_back(number);
        }
      }
      stack.emplace_back(std::move(numbers));
      return true;
    }
    default:
      return false;
  }
}

PyObject* to_python(const c10::IValue& value) {
  return THPVariable_Wrap(value.toTensor());
}

PyObject* call(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto& op = *static_cast<const Operator*>(PyCapsule_GetPointer(self, nullptr));
  std::vector<c10::IValue> stack;
  bool known = count == static_cast<Py_ssize_t>(op.parameters.size()) && !at::impl::torch_function_mode_enabled();
  stack.reserve(op.parameters.size());
  for (Py_ssize_t i = 0; i < count && known; ++i) known = push(stack, arguments[i], op.parameters[i]);
  if (!known) return PyObject_Vectorcall(op.of_torch, arguments, count, nullptr);
  {
    pybind11::gil_scoped_release no_gil;
    op.handle.callBoxed(stack);
  }
  if (stack.empty()) Py_RETURN_NONE;
  if (stack.size() == 1) return to_python(stack[0]);
  PyObject* results = PyTuple_New(static_cast<Py_ssize_t>(stack.size()));
  for (size_t i = 0; i < stack.size(); ++i) PyTuple_SET_ITEM(results, static_cast<Py_ssize_t>(i), to_python(stack[i]));
  return results;
  END_HANDLE_TH_ERRORS
}

bool is_symbolic(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor().unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  if (value.isList()) return std::any_of(value.toListRef().begin(), value.toListRef().end(), is_symbolic);
  return value.isSymInt() && value.toSymInt().is_symbolic();
}

// Checks what the dispatcher, which finds a kernel by the tensors, and the kernel would check about the tensors: that
// they are defined, strided and on one device. It needs no sizes.
void check_tensors(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& stack) {
  const char* op = schema.name().c_str();
  const char* first_name = nullptr;
  at::Tensor first;
  for (size_t i = 0; i < stack.size(); ++i) {
    if (!stack[i].isTensor()) continue;
    const at::Tensor& tensor = stack[i].toTensor();
    check_defined(schema, i, tensor);
    TORCH_CHECK_NOT_IMPLEMENTED(tensor.layout() == at::kStrided, op, " takes strided tensors, not ", tensor.layout());
    const char* name = schema.arguments()[i].name().c_str();
    if (first_name) {
      check_same_device(op, name, tensor, first_name, first);
    } else {
      first_name = name;
      first = tensor;
    }
  }
}

// Runs the operator's kernel on stand-ins for its tensors on the meta device: it checks them and sizes its results, and
// has nothing to compute (to_compute in checks.h). A tensor that vmap batches has the sizes of one sample. Returns
// False if there are symbols among the sizes and numbers, which then have not been checked.
PyObject* check(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto& op = *static_cast<const Operator*>(PyCapsule_GetPointer(self, nullptr));
  const c10::FunctionSchema& schema = op.handle.schema();
  std::vector<c10::IValue> stack;
  stack.reserve(schema.arguments().size());
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::Argument& parameter = schema.arguments()[i];
    stack.push_back(i < static_cast<size_t>(count)
                        ? torch::jit::toIValue(arguments[i], parameter.real_type(), parameter.N())
                        : parameter.default_value().value());
  }
  check_tensors(schema, stack);
  for (c10::IValue& value : stack) {
    if (is_symbolic(value)) Py_RETURN_FALSE;
    if (!value.isTensor()) continue;
    const at::Tensor& tensor = value.toTensor();
    value = at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(), tensor.scalar_type());
  }
  // No mode or transform sees this call.
  const c10::impl::ForceDispatchKeyGuard guard(
      c10::default_included_set, c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView);
  op.handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// A Python function that applies `called` to an operator of torch.ops.pyops.
template <Function called>
pybind11::object bind(const char* name_in_python, const pybind11::object& of_torch) {
  static PyMethodDef method{name_in_python, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called)),
                            METH_FASTCALL, nullptr};
  const auto name = of_torch.attr("_schema").attr("name").cast<std::string>();
  const c10::OperatorHandle handle = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  auto op = std::make_unique<Operator>(Operator{handle, of_torch.inc_ref().ptr(), {}});
  for (const c10::Argument& argument : handle.schema().arguments()) op->parameters.push_back(parameter_of(argument));
  const auto self = pybind11::reinterpret_steal<pybind11::object>(PyCapsule_New(op.release(), nullptr, nullptr));
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, self.ptr()));
}

}  // namespace

// The function that calls the operator. All its arguments are positional, and none may be left out.
pybind11::object bind_operator(const pybind11::object& of_torch) {
  return bind<&call>("operator", of_torch);
}

// The function that calls the operator for its checks alone. Trailing arguments may be left out.
pybind11::object bind_checks(const pybind11::object& of_torch) {
  return bind<&check>("checks", of_torch);
}

}  // namespace pyops
