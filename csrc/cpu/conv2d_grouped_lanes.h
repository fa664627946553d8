// Convolutions of narrow groups over channels-last images, with vectors along the channels of several groups:
// conv2d_grouped_lanes.cpp. Returns false where another kernel is to do it.
#pragma once

#include "conv2d.h"

namespace pyops::cpu {

template <class T>
bool correlate_group_lanes(const Correlation<T>* phases, int64_t count);

}  // namespace pyops::cpu
