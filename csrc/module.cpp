#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_system(py::module_& m);
void bind_nearest_code(py::module_& m);
void bind_index_propagation(py::module_& m);
void bind_maskgit_step(py::module_& m);
void bind_sample_token(py::module_& m);
void bind_attention(py::module_& m);
void bind_decode_attention(py::module_& m);
void bind_decode_linear(py::module_& m);
void bind_conv3x3(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of titok_fast; call them through titok_fast.ops.";
  bind_system(m);
  bind_nearest_code(m);
  bind_index_propagation(m);
  bind_maskgit_step(m);
  bind_sample_token(m);
  bind_attention(m);
  bind_decode_attention(m);
  bind_decode_linear(m);
  bind_conv3x3(m);
}
