#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bind.h"
#include "decode_attention.h"

namespace py = pybind11;

void bind_decode_attention(py::module_& m) {
  using titok::pointer;
  m.def("decode_attention_cpu_workspace", &titok::decode_attention_cpu_workspace, py::arg("length"),
        py::arg("width"), py::arg("threads"));
  m.def(
      "decode_attention_cpu",
      [](std::uintptr_t qkv, int64_t qkv_stride, std::uintptr_t keys, std::uintptr_t values,
         std::uintptr_t rotation, int64_t position, std::uintptr_t out, int64_t batch,
         int64_t heads, int64_t kv_heads, int64_t length, int64_t width, const std::string& dtype,
         std::uintptr_t workspace, int threads) {
        titok::DecodeAttentionArgs args{};
        args.qkv = pointer<const void>(qkv);
        args.qkv_stride = qkv_stride;
        args.keys = pointer<void>(keys);
        args.values = pointer<void>(values);
        args.rotation = pointer<const float>(rotation);
        args.position = position;
        args.out = pointer<void>(out);
        args.batch = batch;
        args.heads = heads;
        args.kv_heads = kv_heads;
        args.length = length;
        args.width = width;
        args.dtype = titok::parse_dtype(dtype);
        args.workspace = pointer<void>(workspace);
        args.threads = threads;
        py::gil_scoped_release release;
        titok::decode_attention_cpu(args);
      },
      py::arg("qkv"), py::arg("qkv_stride"), py::arg("keys"), py::arg("values"),
      py::arg("rotation"), py::arg("position"), py::arg("out"), py::arg("batch"), py::arg("heads"),
      py::arg("kv_heads"), py::arg("length"), py::arg("width"), py::arg("dtype"),
      py::arg("workspace"), py::arg("threads"));
}
