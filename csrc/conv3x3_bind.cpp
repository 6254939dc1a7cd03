#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "bind.h"
#include "conv3x3.h"

namespace py = pybind11;

namespace {

using Shape = std::array<int64_t, 5>;  // batch, height, width, channels, outputs

titok::Conv3x3Args sizes(const Shape& shape, int64_t groups, bool upsample,
                         const std::string& dtype, int threads) {
  titok::Conv3x3Args args{};
  args.batch = shape[0];
  args.height = shape[1];
  args.width = shape[2];
  args.channels = shape[3];
  args.outputs = shape[4];
  args.groups = groups;
  args.upsample = upsample;
  args.dtype = titok::parse_dtype(dtype);
  args.threads = threads;
  return args;
}

}  // namespace

void bind_conv3x3(py::module_& m) {
  using titok::pointer;
  m.def(
      "conv3x3_cpu_layout",
      [](const std::string& dtype) {
        const titok::Conv3x3Layout layout = titok::conv3x3_cpu_layout(titok::parse_dtype(dtype));
        return py::make_tuple(layout.columns, layout.positions, layout.channels, layout.terms);
      },
      py::arg("dtype"));
  m.def(
      "conv3x3_cpu_workspace",
      [](const Shape& shape, int64_t groups, bool upsample, const std::string& dtype, int threads) {
        return titok::conv3x3_cpu_workspace(sizes(shape, groups, upsample, dtype, threads));
      },
      py::arg("shape"), py::arg("groups"), py::arg("upsample"), py::arg("dtype"),
      py::arg("threads"));
  m.def(
      "conv3x3_cpu",
      [](std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t norm,
         std::uintptr_t norm_bias, float norm_eps, std::uintptr_t residual, std::uintptr_t out,
         const Shape& shape, int64_t groups, bool upsample, const std::string& dtype, int threads,
         std::uintptr_t workspace) {
        titok::Conv3x3Args args = sizes(shape, groups, upsample, dtype, threads);
        args.x = pointer<const void>(x);
        args.weight = pointer<const void>(weight);
        args.bias = pointer<const void>(bias);
        args.norm = pointer<const void>(norm);
        args.norm_bias = pointer<const void>(norm_bias);
        args.norm_eps = norm_eps;
        args.residual = pointer<const void>(residual);
        args.out = pointer<void>(out);
        args.workspace = pointer<void>(workspace);
        py::gil_scoped_release release;
        titok::conv3x3_cpu(args);
      },
      py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("norm"), py::arg("norm_bias"),
      py::arg("norm_eps"), py::arg("residual"), py::arg("out"), py::arg("shape"), py::arg("groups"),
      py::arg("upsample"), py::arg("dtype"), py::arg("threads"), py::arg("workspace"));
}
