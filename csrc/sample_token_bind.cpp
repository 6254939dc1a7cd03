#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "bind.h"
#include "sample_token.h"

namespace py = pybind11;

namespace {

using titok::Pair;
using titok::pointer;
using titok::value;

void define(py::module_& m, const char* name, void (*run)(const titok::SampleTokenArgs&)) {
  m.def(
      name,
      [run](std::uintptr_t cond, std::uintptr_t uncond, int64_t cond_stride, int64_t uncond_stride,
            int64_t batch, int64_t vocabulary, const std::string& dtype, std::uintptr_t image_ids,
            const Pair<int64_t>& top_k, const Pair<int64_t>& seed, const Pair<int64_t>& step,
            const Pair<float>& guidance_scale, const Pair<float>& temperature,
            const Pair<float>& top_p, std::uintptr_t tokens, std::uintptr_t workspace, int threads,
            std::uintptr_t stream) {
        titok::SampleTokenArgs args{};
        args.cond = pointer<const void>(cond);
        args.uncond = pointer<const void>(uncond);
        args.cond_stride = cond_stride;
        args.uncond_stride = uncond_stride;
        args.batch = batch;
        args.vocabulary = vocabulary;
        args.dtype = titok::parse_dtype(dtype);
        args.image_ids = pointer<const int64_t>(image_ids);
        args.top_k = value(top_k);
        args.seed = value(seed);
        args.step = value(step);
        args.guidance_scale = value(guidance_scale);
        args.temperature = value(temperature);
        args.top_p = value(top_p);
        args.tokens = pointer<int64_t>(tokens);
        args.workspace = pointer<void>(workspace);
        args.threads = threads;
        args.stream = pointer<void>(stream);
        py::gil_scoped_release release;
        run(args);
      },
      py::arg("cond"), py::arg("uncond"), py::arg("cond_stride"), py::arg("uncond_stride"),
      py::arg("batch"), py::arg("vocabulary"), py::arg("dtype"), py::arg("image_ids"),
      py::arg("top_k"), py::arg("seed"), py::arg("step"), py::arg("guidance_scale"),
      py::arg("temperature"), py::arg("top_p"), py::arg("tokens"), py::arg("workspace"),
      py::arg("threads"), py::arg("stream"));
}

}  // namespace

void bind_sample_token(py::module_& m) {
  m.def("sample_token_cpu_workspace", &titok::sample_token_cpu_workspace, py::arg("batch"),
        py::arg("vocabulary"), py::arg("threads"));
  define(m, "sample_token_cpu", titok::sample_token_cpu);
#ifdef TITOK_FAST_CUDA
  m.def(
      "sample_token_cuda_workspace",
      [](int64_t batch, int64_t vocabulary, const Pair<int64_t>& top_k, const Pair<float>& top_p) {
        titok::SampleTokenArgs args{};
        args.batch = batch;
        args.vocabulary = vocabulary;
        args.top_k = value(top_k);
        args.top_p = value(top_p);
        return titok::sample_token_cuda_workspace(args);
      },
      py::arg("batch"), py::arg("vocabulary"), py::arg("top_k"), py::arg("top_p"));
  define(m, "sample_token_cuda", titok::sample_token_cuda);
#endif
}
