// A stand-in for csrc/: a module that carries a stamp and registers nothing, for the tests of loader and packaging. It
// compiles in a fraction of a second.
#include <Python.h>

// Another entry point than the module's name makes a module that does not load.
#ifndef LLMKERN_ENTRY
#define LLMKERN_ENTRY LLMKERN_MODULE
#endif

#define LLMKERN_TEXT_(x) #x
#define LLMKERN_TEXT(x) LLMKERN_TEXT_(x)
#define LLMKERN_JOIN_(a, b) a##b
#define LLMKERN_JOIN(a, b) LLMKERN_JOIN_(a, b)

namespace {

__attribute__((used)) const char kStamp[] = "llmkern-build:torch=" LLMKERN_TEXT(LLMKERN_TORCH) ";isa=" LLMKERN_TEXT(
    LLMKERN_ISA) ";schemas=" LLMKERN_TEXT(LLMKERN_SCHEMAS) ";";

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "torch", LLMKERN_TEXT(LLMKERN_TORCH), "isa", LLMKERN_TEXT(LLMKERN_ISA),
                       "schemas", LLMKERN_TEXT(LLMKERN_SCHEMAS));
}

PyObject* register_ops(PyObject*, PyObject*) { Py_RETURN_NONE; }

PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, nullptr},
                         {"register_ops", register_ops, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, LLMKERN_TEXT(LLMKERN_ENTRY), nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC LLMKERN_JOIN(PyInit_, LLMKERN_ENTRY)() { return PyModule_Create(&module); }
