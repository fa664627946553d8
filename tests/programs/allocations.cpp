// Replaces the C library's allocation functions when a test preloads it, and counts the calls that come from one range
// of addresses, the code of the kernels.
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <new>

extern "C" {
// The C library's own functions, under the names by which they remain reachable.
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {

char *code_begin = nullptr, *code_end = nullptr;
std::atomic<long> allocations = 0;

void* noted(void* caller, void* memory) {
  if (caller >= code_begin && caller < code_end) ++allocations;
  return memory;
}

}  // namespace

#define NOTED(memory) noted(__builtin_return_address(0), memory)

extern "C" {
void watch(char* begin, char* end) {
  code_begin = begin, code_end = end;
}
long allocations_so_far() {
  return allocations;
}
void* malloc(size_t size) {
  return NOTED(__libc_malloc(size));
}
void* calloc(size_t count, size_t size) {
  return NOTED(__libc_calloc(count, size));
}
void* realloc(void* memory, size_t size) {
  return NOTED(__libc_realloc(memory, size));
}
void* aligned_alloc(size_t alignment, size_t size) {
  return NOTED(__libc_memalign(alignment, size));
}
int posix_memalign(void** memory, size_t alignment, size_t size) {
  *memory = NOTED(__libc_memalign(alignment, size));
  return *memory ? 0 : ENOMEM;
}
}

// std::vector and the like call these. The standard library's operator delete, which calls free, matches them.
void* operator new(size_t size) {
  if (void* memory = NOTED(__libc_malloc(size))) return memory;
  throw std::bad_alloc();
}
void* operator new(size_t size, std::align_val_t alignment) {
  if (void* memory = NOTED(__libc_memalign(static_cast<size_t>(alignment), size))) return memory;
  throw std::bad_alloc();
}
