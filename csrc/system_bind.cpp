#include <pybind11/pybind11.h>

#include <string>

#include "system.h"

namespace py = pybind11;

void bind_system(py::module_& m) {
  using namespace titok;
  m.def("detected_isa", [] { return std::string(isa_name(detected_isa())); });
  m.def("fastest_isa", [] { return std::string(isa_name(fastest_isa())); });
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("force_isa", &force_isa, py::arg("name"));
#ifdef TITOK_FAST_CUDA
  m.attr("cuda_architectures") = py::str(TITOK_FAST_CUDA_ARCHITECTURES);
  m.def("cuda_runtime_version", &cuda_runtime_version);
  m.def("cuda_code", [](int device) {
    const CudaCode code = cuda_code(device);
    py::dict result;
    result["binary_capability"] = code.binary_capability;
    result["error"] = code.error ? py::object(py::str(code.error)) : py::none();
    return result;
  });
#else
  m.attr("cuda_architectures") = py::str("");
#endif
}
