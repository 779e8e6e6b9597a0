// Binds the emulator to Python. Loading the module also registers the kernels, emulated, for the CPU.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/runtime.h"
#include "probes.h"

namespace py = pybind11;
using namespace taps_fast::cuda;

namespace {

using Floats = py::array_t<float, py::array::c_style>;

template <auto kernel>
void probe(py::module_& m, const char* name) {
  m.def(
      name,
      [](const Floats& in, int size_out, int threads, int64_t blocks) {
        Floats out(size_out);
        const Probe p{in.data(), static_cast<int>(in.size()), out.mutable_data(), size_out};
        const char* error = launch<kernel>(Grid{blocks, threads, static_cast<int>(blocks), 2048}, p, nullptr);
        if (error) throw std::runtime_error(error);
        return out;
      },
      py::arg("in"), py::arg("size_out"), py::arg("threads") = 32, py::arg("blocks") = 1);
}

}  // namespace

PYBIND11_MODULE(emulated, m) {
  using emulator::Settings;
  py::class_<emulator::Launch>(m, "Launch")
      .def_readonly("blocks", &emulator::Launch::blocks)
      .def_readonly("threads", &emulator::Launch::threads)
      .def_readonly("cluster", &emulator::Launch::cluster)
      .def_readonly("shared_bytes", &emulator::Launch::shared_bytes);
  py::class_<Settings>(m, "Settings")
      .def(py::init())
      .def_readwrite("processors", &Settings::processors)
      .def_readwrite("has_clusters", &Settings::has_clusters)
      .def_readwrite("served", &Settings::served)
      .def_readwrite("shared_limit", &Settings::shared_limit)
      .def_readwrite("order", &Settings::order)
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("refuse", &Settings::refuse)
      .def_readonly("launches", &Settings::launches);
  m.def("settings", [] { return &emulator::settings; }, py::return_value_policy::reference);
  m.def("reset", [] { emulator::settings = Settings{}; });

  probe<probe_mma<BFloat16>>(m, "mma_bfloat16");
  probe<probe_mma<Half>>(m, "mma_float16");
  probe<probe_warp>(m, "warp");
  probe<probe_neighbour<true>>(m, "neighbour");
  probe<probe_neighbour<false>>(m, "neighbour_without_barrier");
  probe<probe_copy<0>>(m, "copy");
  probe<probe_copy<1>>(m, "copy_first");
  probe<probe_copy<2>>(m, "copy_without_wait");
  probe<probe_cluster<true>>(m, "cluster");
  probe<probe_cluster<false>>(m, "cluster_without_barrier");
  probe<probe_deadlock>(m, "deadlock");
  probe<probe_reads_beyond>(m, "reads_beyond");
  probe<probe_writes_input>(m, "writes_input");
  probe<probe_misaligned_copy>(m, "misaligned_copy");
  probe<probe_writes_beyond_shared>(m, "writes_beyond_shared");
}
