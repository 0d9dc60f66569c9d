// Where an op runs: the tensor's device, made current, and its stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

// A CPU build of torch lacks this symbol, so that it must be weak; without CUDA nobody calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace pixart {

class Device {
 public:
  explicit Device(const torch::stable::Tensor& tensor) : device_(tensor.device()) {
    if (!on_gpu()) return;
    const int32_t index = tensor.get_device_index();
    guard_.emplace(index);
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                        aoti_torch_get_current_cuda_stream(index, &stream_) == 0,
                    "torch gave no CUDA stream for device ", index);
  }

  bool on_gpu() const { return device_.is_cuda(); }
  void* stream() const { return stream_; }

  void check(const torch::stable::Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.device() == device_, "`", name, "` must be on the device of x");
  }

  // Whether an op family's CUDA kernels are to run: always under emulation, which tests them on
  // CPU tensors.
  bool runs_cuda() const {
#ifdef PIXART_KERNELS_EMULATED
    return true;
#else
    return on_gpu();
#endif
  }

 private:
  torch::stable::Device device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace pixart
