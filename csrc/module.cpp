// What Python sees of the kernels beside the ops. A library of its own, because it belongs to one
// Python, and the ops' library to none.
#include <cxxabi.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "include/kernel_table.h"

namespace py = pybind11;

namespace {

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(
      abi::__cxa_demangle(name, nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : name;
}

// -1 is what nobody could answer.
std::optional<int> answer(int value) {
  return value < 0 ? std::nullopt : std::optional<int>(value);
}

py::dict as_dict(const pixart::KernelDescription& kernel) {
  using py::literals::operator""_a;
  return py::dict("type"_a = demangled(kernel.type), "threads"_a = kernel.threads,
                  "dynamic_shared"_a = kernel.dynamic_shared,
                  "registers"_a = answer(kernel.registers), "local"_a = answer(kernel.local),
                  "static_shared"_a = answer(kernel.static_shared),
                  "binary"_a = answer(kernel.binary), "blocks"_a = answer(kernel.blocks),
                  "max_threads"_a = answer(kernel.max_threads));
}

// The kernel table of the ops' library at `path`, which is loaded already; empty if it was built
// without CUDA.
std::vector<py::dict> kernels(const std::string& path) {
  // never closed: torch keeps the library as long
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) throw std::runtime_error(path + " is not loaded");
  const auto count =
      reinterpret_cast<decltype(&pixart_kernels_count)>(dlsym(library, "pixart_kernels_count"));
  const auto describe = reinterpret_cast<decltype(&pixart_kernels_describe)>(
      dlsym(library, "pixart_kernels_describe"));
  std::vector<py::dict> found;
  if (count == nullptr || describe == nullptr) return found;
  for (int i = 0; i < count(); ++i) {
    pixart::KernelDescription kernel;
    describe(i, &kernel);
    found.push_back(as_dict(kernel));
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_introspection, m) {
  m.def("kernels", &kernels, py::arg("library"));
}
