// The algorithms of conv2d in order of preference, one table for each direction; csrc/algorithms.h says how one is
// chosen. The file that the table names, or the .cpp file that includes it, defines what an algorithm supports and when
// it is profitable.
#pragma once

#include "../runtime/algorithms.h"
#include "problem.h"

namespace pyops::cpu {

// ---- convolutions: the forward, and the input gradient as a convolution of grad_output ----

// A sample's result must not depend on its batch, although a batch of another size may be computed by another
// algorithm. So an algorithm that is chosen only at some batch sizes must sum in the same order as those that are
// chosen at the others.
template <class T>
struct ConvolutionAlgorithm {
  const char *name, *file;
  bool (*supports)(const Phases<T>&);
  bool (*profitable)(const Phases<T>&);
  // Whether it sums over k in the order of the filters in memory and in chunks of at most KC terms.
  bool (*sums_in_order)(const Phases<T>&);
  void (*run)(const Phases<T>&);
};

#define PYOPS_CONVOLUTION(Name)                    \
  template <class T>                               \
  struct Name {                                    \
    static bool supports(const Phases<T>& x);      \
    static bool profitable(const Phases<T>& x);    \
    static bool sums_in_order(const Phases<T>& x); \
    static void run(const Phases<T>& x);           \
  };
PYOPS_CONVOLUTION(GroupedLanes)
PYOPS_CONVOLUTION(GroupedPlanes)
PYOPS_CONVOLUTION(BatchLanes)
PYOPS_CONVOLUTION(Depthwise3x3)
PYOPS_CONVOLUTION(Depthwise)
PYOPS_CONVOLUTION(ImplicitGemmWidth)
PYOPS_CONVOLUTION(Direct3Wide)
PYOPS_CONVOLUTION(ImplicitGemmChannels)
#undef PYOPS_CONVOLUTION

template <class Name, class T>
constexpr ConvolutionAlgorithm<T> convolution(const char* name, const char* file) {
  return {name, file, Name::supports, Name::profitable, Name::sums_in_order, Name::run};
}

template <class T>
constexpr ConvolutionAlgorithm<T> convolution_algorithms[] = {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    // Groups that are too narrow for a vector of their own share one, and nothing is copied or transposed.
    convolution<GroupedLanes<T>, T>("grouped_lanes", "csrc/cpu/conv2d/grouped_lanes.cpp"),
#endif
    // Narrow groups that cannot share vectors would leave most lanes idle; as planes, they can be convolved along the
    // width.
    convolution<GroupedPlanes<T>, T>("grouped_planes", "csrc/cpu/conv2d/grouped_planes.cpp"),
    // Small images with few channels would leave lanes idle or multiply many zeros; a batch fills the lanes.
    convolution<BatchLanes<T>, T>("batch_lanes", "csrc/cpu/conv2d/batch_lanes.cpp"),
    // A group would be a matrix of a single row, whose operands take longer to lay out than to multiply.
    convolution<Depthwise3x3<T>, T>("depthwise_3x3", "csrc/cpu/conv2d/depthwise_3x3.h"),
    convolution<Depthwise<T>, T>("depthwise", "csrc/cpu/conv2d/depthwise.cpp"),
    // Few output channels fill only a small part of a vector.
    convolution<ImplicitGemmWidth<T>, T>("implicit_gemm_width", "csrc/cpu/conv2d/implicit_gemm_width.cpp"),
    // A register tile of one vector of output channels takes a load for every FMA, unless three taps share it.
    convolution<Direct3Wide<T>, T>("direct_3wide", "csrc/cpu/conv2d/direct_3wide.cpp"),
    // Many output channels fill whole vectors, whatever the size of the images.
    convolution<ImplicitGemmChannels<T>, T>("implicit_gemm_channels", "csrc/cpu/conv2d/implicit_gemm_channels.cpp"),
};

// Chooses an algorithm and runs it.
template <class T>
void convolve(Choice& choice, const Phases<T>& x) {
  choose(choice, convolution_algorithms<T>, x).run(x);
}

// Whether a group has one channel on either side.
template <class T>
bool has_one_channel_groups(const ConvProblem<T>& x) {
  return x.input.channels == 1 && x.out_channels == 1;
}

// Whether the depthwise algorithm, which takes each sum in one chain, would be chosen and K is longer than a chunk.
template <class T>
bool has_long_chains(const ConvProblem<T>& x) {
  return x.groups > 1 && has_one_channel_groups(x) && x.depth() > KC;
}

// Whether the lanes that other algorithms would leave idle, or spend on the zeros around an image, outweigh the
// transposes of a block of `count` images into cache and back.
template <class T>
bool is_worth_batch_lanes(const ConvProblem<T>& x, int64_t count);

// Whether the channels are even and, for a tile unit, enough: a piece of K takes 32 terms, and with fewer than 16
// channels it is copied from three or more taps, after which multiplying single numbers costs no more (reasoned, not
// measured).
template <class T>
bool could_multiply_pairs(const ConvProblem<T>& x) {
  const int64_t channels = x.input.channels;
  return has_pairs<T>() && channels % 2 == 0 && (channels >= 16 || !uses_tiles<Bf16Pair>());
}

// Whether the implicit GEMMs multiply the channels, whose number is then even, in bfloat16 pairs (gemm/operand.h). A
// problem that would use batch lanes at some batch size never does, because a sample's result must not depend on the
// batch it is in.
template <class T>
bool multiplies_pairs(const ConvProblem<T>& x);

// Whether batch_lanes and the algorithm that is chosen give the same bits, so that the batch size may decide between
// them.
template <class T>
bool agrees_with_batch_lanes(bool sums_in_order, const ConvProblem<T>& x) {
  return sums_in_order && !multiplies_pairs(x);
}

// ---- the input gradient ----

// The problem, and the phases of its convolution, which are built when they are first asked for.
template <class T>
class InputGradient {
 public:
  explicit InputGradient(const Conv2dBackwardArgs& x) : args(x) {}

  const Phases<T>& phases() const {
    if (phases_.count == 0) phases_ = input_gradient_phases<T>(args);
    return phases_;
  }

  const Conv2dBackwardArgs& args;

 private:
  mutable Phases<T> phases_{nullptr, 0};
};

// Whether batch_lanes and the algorithm that is chosen for the input gradient give the same bits.
template <class T>
bool input_gradient_agrees_with_batch_lanes(const Conv2dBackwardArgs& x);

// The input gradient of one group by kn2row. T: float or double.
template <class T>
struct Kn2row {
  static bool supports(const InputGradient<T>& x);
  static bool profitable(const InputGradient<T>& x);
  static void run(const InputGradient<T>& x);
};

// ---- the weight gradient ----

#define PYOPS_WEIGHT_GRADIENT(Name)                     \
  template <class T>                                    \
  struct Name {                                         \
    static bool supports(const WeightGradient<T>& x);   \
    static bool profitable(const WeightGradient<T>& x); \
    static void run(const WeightGradient<T>& x);        \
  };
PYOPS_WEIGHT_GRADIENT(GroupedLanesWgrad)
PYOPS_WEIGHT_GRADIENT(Depthwise3x3Wgrad)
PYOPS_WEIGHT_GRADIENT(DepthwiseWgrad)
PYOPS_WEIGHT_GRADIENT(GroupedPlanesWgrad)
PYOPS_WEIGHT_GRADIENT(DotProductsWidthWgrad)
PYOPS_WEIGHT_GRADIENT(ImplicitGemmInputsWgrad)
PYOPS_WEIGHT_GRADIENT(ImplicitGemmOutputsWgrad)
#undef PYOPS_WEIGHT_GRADIENT

template <class Name, class Problem>
constexpr Algorithm<Problem> algorithm(const char* name, const char* file) {
  return {name, file, Name::supports, Name::profitable, Name::run};
}

template <class T>
constexpr Algorithm<WeightGradient<T>> weight_gradient_algorithms[] = {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    // Groups that are too narrow for a vector of their own share one, and nothing is copied or transposed.
    algorithm<GroupedLanesWgrad<T>, WeightGradient<T>>("grouped_lanes",
                                                       "csrc/cpu/conv2d/grouped_lanes_weight_gradient.cpp"),
#endif
    // A group has only one channel on either side, too little for a register tile.
    algorithm<Depthwise3x3Wgrad<T>, WeightGradient<T>>("depthwise_3x3", "csrc/cpu/conv2d/depthwise_3x3.h"),
    algorithm<DepthwiseWgrad<T>, WeightGradient<T>>("depthwise", "csrc/cpu/conv2d/depthwise_weight_gradient.cpp"),
    // Narrow groups that cannot share vectors are slow to read from channels-last images, group by group.
    algorithm<GroupedPlanesWgrad<T>, WeightGradient<T>>("grouped_planes", "csrc/cpu/conv2d/weight_gradient.cpp"),
    // The one of the three that leaves the fewest lanes idle.
    algorithm<DotProductsWidthWgrad<T>, WeightGradient<T>>("dot_products_width",
                                                           "csrc/cpu/conv2d/weight_gradient_width.h"),
    algorithm<ImplicitGemmInputsWgrad<T>, WeightGradient<T>>("implicit_gemm_inputs",
                                                             "csrc/cpu/conv2d/weight_gradient_inputs.h"),
    algorithm<ImplicitGemmOutputsWgrad<T>, WeightGradient<T>>("implicit_gemm_outputs",
                                                              "csrc/cpu/conv2d/weight_gradient_outputs.h"),
};

// Computes grad_weight of conv2d_backward.
template <class T>
void weight_gradient(const Conv2dBackwardArgs& x);

}  // namespace pyops::cpu
