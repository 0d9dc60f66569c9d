// Every CUDA kernel of this library with its launch parameters, so that Python can show registers,
// shared memory and occupancy. A kernel enters the table when the library is loaded, if the code
// that launches it says
//
//   register_kernel<forward<X, Branch>, kThreads>();
//
// which costs nothing where it stands. A test compares the table with what the compiler built.
#pragma once

#include <typeinfo>

namespace pixart {

// Its mangled name contains the kernel's.
template <auto kKernel>
struct KernelType {};

struct KernelEntry {
  const std::type_info& type;
  const void* function;
  int threads;         // per block
  int dynamic_shared;  // bytes, of the largest launch
  const KernelEntry* next;
};

inline const KernelEntry* kernel_table = nullptr;

template <auto kKernel, int kThreads, int kDynamicShared>
struct RegisteredKernel : KernelEntry {
  RegisteredKernel()
      : KernelEntry{typeid(KernelType<kKernel>), reinterpret_cast<const void*>(kKernel), kThreads,
                    kDynamicShared, kernel_table} {
    kernel_table = this;
  }
};

template <auto kKernel, int kThreads, int kDynamicShared>
inline const RegisteredKernel<kKernel, kThreads, kDynamicShared> registered_kernel;

template <auto kKernel, int kThreads, int kDynamicShared = 0>
void register_kernel() {
  static_cast<void>(&registered_kernel<kKernel, kThreads, kDynamicShared>);
}

// What Python asks through the two functions below; -1 where there is no GPU to answer.
struct KernelDescription {
  const char* type;  // mangled name of KernelType<kernel>
  int threads;
  int dynamic_shared;  // bytes
  int registers;
  int local;          // bytes per thread; spills live here
  int static_shared;  // bytes
  int binary;         // 10 * major + minor of the code that the driver chose
  int blocks;         // resident on a multiprocessor at full load
  int max_threads;    // of a multiprocessor
};

}  // namespace pixart

extern "C" {
__attribute__((visibility("default"))) int pixart_kernels_count();
__attribute__((visibility("default"))) void pixart_kernels_describe(
    int index, pixart::KernelDescription* description);
}
