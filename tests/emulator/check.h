// What the emulator's own tests share. `check_NAME CASE` runs one case; without CASE it lists all cases. A case whose
// name begins with "refuses" contains a misuse that must abort; test_emulator.py expects the message that is listed
// with it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <limits>
#include <string>

inline void expect(bool condition, const char* text, int line) {
  if (condition) return;
  std::printf("line %d: not true: %s\n", line, text);
  std::exit(1);
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared, Arguments... arguments) {
  const cudaLaunchConfig_t config{grid, threads, shared, nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T>
T* shared() {
  return reinterpret_cast<T*>(emulator::block.shared);
}

template <void (*kernel)()>
void run() {
  launch(kernel, 1, 64, 0);
}
template <void (*kernel)()>
void run_with_shared() {
  launch(kernel, 1, 64, 1024);
}

struct Case {
  const char* name;
  void (*run)();
  const char* message = nullptr;
};

template <size_t size>
int run_cases(const Case (&cases)[size], int count, char** arguments) {
  for (const Case& one : cases) {
    if (count < 2) {
      std::printf("%s;%s\n", one.name, one.message ? one.message : "");
    } else if (std::string(arguments[1]) == one.name) {
      one.run();
    }
  }
  return 0;
}
