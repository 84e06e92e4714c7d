// The Python module l2l_fast._C: facts about the build and the machine. Importing it registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>
#if defined(L2L_FAST_WITH_CUDA)
#include <cuda.h>
#endif

#include <chrono>

#include "core/state_io.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

// Multiply-adds per second of the calling thread at the selected instruction set.
double fma_rate(double seconds) {
  if (!(seconds > 0))
    throw std::invalid_argument("seconds: expected a positive number, got " + std::to_string(seconds));
  using clock = std::chrono::steady_clock;
  float sink[64];
  int64_t done = 0;
  const auto begin = clock::now();
  double elapsed = 0;
  do {
    done += l2l::kernels().multiply_adds(20000, sink);
    elapsed = std::chrono::duration<double>(clock::now() - begin).count();
  } while (elapsed < seconds);
  return done / elapsed;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
#if defined(L2L_FAST_WITH_CUDA)
  py::dict cuda;
  cuda["version"] = std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION / 10 % 100);
  cuda["architectures"] = L2L_FAST_CUDA_ARCHITECTURES;
  info["cuda"] = cuda;
#else
  info["cuda"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  l2l::kernels();  // a wrong L2L_FAST_ISA fails the import, not the first step
  // l2l_fast/__init__.py refuses an extension of another version.
  m.attr("version") = L2L_FAST_VERSION;
  m.attr("TILE") = l2l::kTile;
  m.def("isa", [] { return std::string(l2l::kernels().name); }, "The instruction set in use.");
  m.def("isa_available", &l2l::available_instruction_sets,
        "Instruction sets this build and machine have, slowest first.");
  m.def("set_isa", &l2l::set_instruction_set, py::arg("name"),
        "Switch the instruction set; ValueError if not available.");
  m.def("fma_rate", &fma_rate, py::arg("seconds") = 0.2, py::call_guard<py::gil_scoped_release>(),
        "Multiply-adds per second of the calling thread.");
  m.def("build_info", &build_info, "Versions this extension was built with.");
}
