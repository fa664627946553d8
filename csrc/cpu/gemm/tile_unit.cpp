// The choice of the tile unit that a process uses (gemm/tile_unit.h).
//
// The registers of AMX are part of a thread's state only if the system has enabled them and the process has asked for
// them. It asks once, with the first product of bfloat16; threads that begin later inherit the permission, and those
// that exist already have it too.
#include "tile_unit.h"

#include <cstdlib>
#include <string>

#include "../common.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyops::cpu {
namespace {

constexpr bool can_have_tiles = by_capability(false, false, true);

// Whether the CPU multiplies tiles of bfloat16, and the system saves their registers and lets this process use them.
bool obtain_amx() {
#if defined(CPU_CAPABILITY_AVX512) && defined(__linux__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;  // of CPUID leaf 7 in edx
  constexpr unsigned tile_state = 3u << 17;                     // of XCR0
  constexpr long request_permission = 0x1023, tile_data = 18;   // of arch_prctl
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx_bf16) == 0 || (d & amx_tile) == 0) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & tile_state) != tile_state) return false;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

TileUnit choose_unit() {
  const char* variable = std::getenv("PYOPS_TILES");
  const std::string value = variable == nullptr ? "" : variable;
  const auto refuse = [&](const char* reason) { throw std::invalid_argument("PYOPS_TILES=" + value + ": " + reason); };
  if (value == "off") return TileUnit::none;
  if (value != "" && value != "amx" && value != "model") refuse("the values are amx, model and off");
  if (value != "" && !can_have_tiles) refuse("only the AVX-512 kernels multiply tiles");
  if (value == "model") return TileUnit::model;
  const bool obtained = obtain_amx();
  if (value == "amx" && !obtained) refuse("this CPU has no tiles of bfloat16, or the system does not permit them");
  return obtained ? TileUnit::amx : TileUnit::none;
}

}  // namespace

TileUnit tile_unit() {
  static const TileUnit unit = choose_unit();
  return unit;
}

}  // namespace pyops::cpu
