#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>

#include "bind.h"
#include "decode_linear.h"

namespace py = pybind11;

void bind_decode_linear(py::module_& m) {
  using titok::pointer;
  using Rows = std::pair<std::uintptr_t, int64_t>;  // address or 0, stride
  m.def("decode_linear_cpu_workspace", &titok::decode_linear_cpu_workspace, py::arg("batch"),
        py::arg("width"), py::arg("size"), py::arg("threads"));
  m.def(
      "decode_linear_cpu",
      [](const Rows& x, const Rows& weight, std::uintptr_t norm, float norm_eps, const Rows& scale,
         const Rows& shift, const Rows& up_weight, const Rows& residual, const Rows& residual_scale,
         std::uintptr_t out, int64_t batch, int64_t width, int64_t size, const std::string& dtype,
         std::uintptr_t workspace, int threads) {
        const auto rows = [](const Rows& given) {
          return titok::DecodeRows{pointer<const void>(given.first), given.second};
        };
        titok::DecodeLinearArgs args{};
        args.x = rows(x);
        args.weight = rows(weight);
        args.norm = pointer<const void>(norm);
        args.norm_eps = norm_eps;
        args.scale = rows(scale);
        args.shift = rows(shift);
        args.up_weight = rows(up_weight);
        args.residual = rows(residual);
        args.residual_scale = rows(residual_scale);
        args.out = pointer<void>(out);
        args.batch = batch;
        args.width = width;
        args.size = size;
        args.dtype = titok::parse_dtype(dtype);
        args.workspace = pointer<void>(workspace);
        args.threads = threads;
        py::gil_scoped_release release;
        titok::decode_linear_cpu(args);
      },
      py::arg("x"), py::arg("weight"), py::arg("norm"), py::arg("norm_eps"), py::arg("scale"),
      py::arg("shift"), py::arg("up_weight"), py::arg("residual"), py::arg("residual_scale"),
      py::arg("out"), py::arg("batch"), py::arg("width"), py::arg("size"), py::arg("dtype"),
      py::arg("workspace"), py::arg("threads"));
}
