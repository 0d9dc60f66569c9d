// Answers for the kernel table. It is part of the ops' library because only the CUDA runtime that
// is linked into it knows the library's kernels.
#include <cuda_runtime.h>

#include "include/kernel_table.h"

int pixart_kernels_count() {
  int count = 0;
  for (auto* entry = pixart::kernel_table; entry != nullptr; entry = entry->next) ++count;
  return count;
}

void pixart_kernels_describe(int index, pixart::KernelDescription* description) {
  const pixart::KernelEntry* entry = pixart::kernel_table;
  while (index-- > 0) entry = entry->next;
  *description = {
      entry->type.name(), entry->threads, entry->dynamic_shared, -1, -1, -1, -1, -1, -1};
  cudaFuncAttributes attributes;
  int device, blocks, threads;
  const bool answered =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaFuncGetAttributes(&attributes, entry->function) == cudaSuccess &&
      // as a launch asks for it: more than 48 KiB are not counted otherwise
      cudaFuncSetAttribute(entry->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           entry->dynamic_shared) == cudaSuccess &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry->function, entry->threads,
                                                    entry->dynamic_shared) == cudaSuccess &&
      cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, device) ==
          cudaSuccess;
  if (!answered) {
    cudaGetLastError();  // not to be found by the next launch
    return;
  }
  description->registers = attributes.numRegs;
  description->local = static_cast<int>(attributes.localSizeBytes);
  description->static_shared = static_cast<int>(attributes.sharedSizeBytes);
  description->binary = attributes.binaryVersion;
  description->blocks = blocks;
  description->max_threads = threads;
}
