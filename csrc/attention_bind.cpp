#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "attention.h"
#include "bind.h"

namespace py = pybind11;

void bind_attention(py::module_& m) {
  using titok::pointer;
  m.def(
      "attention_cpu_workspace",
      [](int64_t length, int64_t width, const std::string& dtype, int threads) {
        return titok::attention_cpu_workspace(length, width, titok::parse_dtype(dtype), threads);
      },
      py::arg("length"), py::arg("width"), py::arg("dtype"), py::arg("threads"));
  m.def(
      "attention_cpu",
      [](std::uintptr_t qkv, int64_t batch_stride, int64_t row_stride, int64_t part_stride,
         int64_t head_stride, std::uintptr_t out, int64_t batch, int64_t length, int64_t heads,
         int64_t width, const std::string& dtype, std::uintptr_t workspace, int threads) {
        titok::AttentionArgs args{};
        args.qkv = pointer<const void>(qkv);
        args.batch_stride = batch_stride;
        args.row_stride = row_stride;
        args.part_stride = part_stride;
        args.head_stride = head_stride;
        args.out = pointer<void>(out);
        args.batch = batch;
        args.length = length;
        args.heads = heads;
        args.width = width;
        args.dtype = titok::parse_dtype(dtype);
        args.workspace = pointer<void>(workspace);
        args.threads = threads;
        py::gil_scoped_release release;
        titok::attention_cpu(args);
      },
      py::arg("qkv"), py::arg("batch_stride"), py::arg("row_stride"), py::arg("part_stride"),
      py::arg("head_stride"), py::arg("out"), py::arg("batch"), py::arg("length"), py::arg("heads"),
      py::arg("width"), py::arg("dtype"), py::arg("workspace"), py::arg("threads"));
}
