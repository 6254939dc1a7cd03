#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "nearest_code.h"

namespace py = pybind11;

namespace {

titok::Metric parse_metric(const std::string& name) {
  if (name == "l2") return titok::Metric::l2;
  if (name == "cosine") return titok::Metric::cosine;
  if (name == "dot") return titok::Metric::dot;
  throw std::invalid_argument("metric: '" + name + "' is not l2, cosine or dot");
}

}  // namespace

void bind_nearest_code(py::module_& m) {
  m.def(
      "nearest_code_cpu_workspace",
      [](int64_t n, int64_t k, int64_t d, const std::string& metric, int threads) {
        return titok::nearest_code_cpu_workspace(n, k, d, parse_metric(metric), threads);
      },
      py::arg("n"), py::arg("k"), py::arg("d"), py::arg("metric"), py::arg("threads"));
  m.def(
      "nearest_code_cpu",
      [](std::uintptr_t z, int64_t z_stride, std::uintptr_t codebook, int64_t codebook_stride,
         int64_t n, int64_t k, int64_t d, const std::string& dtype, const std::string& metric,
         std::uintptr_t indices, std::uintptr_t distances, std::uintptr_t rescored,
         std::uintptr_t workspace, int threads) {
        titok::NearestCodeArgs args{};
        args.z = titok::pointer<const void>(z);
        args.codebook = titok::pointer<const void>(codebook);
        args.z_stride = z_stride;
        args.codebook_stride = codebook_stride;
        args.n = n;
        args.k = k;
        args.d = d;
        args.dtype = titok::parse_dtype(dtype);
        args.metric = parse_metric(metric);
        args.indices = titok::pointer<int64_t>(indices);
        args.distances = titok::pointer<float>(distances);
        args.rescored = titok::pointer<int64_t>(rescored);
        args.workspace = titok::pointer<void>(workspace);
        args.threads = threads;
        py::gil_scoped_release release;
        titok::nearest_code_cpu(args);
      },
      py::arg("z"), py::arg("z_stride"), py::arg("codebook"), py::arg("codebook_stride"),
      py::arg("n"), py::arg("k"), py::arg("d"), py::arg("dtype"), py::arg("metric"),
      py::arg("indices"), py::arg("distances"), py::arg("rescored"), py::arg("workspace"),
      py::arg("threads"));
}
