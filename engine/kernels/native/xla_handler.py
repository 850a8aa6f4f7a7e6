"""LLVM text → machine code that compiled programs call: XLA's foreign function interface.

A kernel is two LLVM functions over an array of pointers to XLA's buffers, arguments first:

    i64  @count(ptr %buffers)               into how many chunks the work is cut
    void @chunk(ptr %buffers, i64 %index)   does one of them, in any thread

Around them stands `@handler`, which XLA calls. It asks XLA's own thread pool for help and works
along: each thread claims the next chunk until none is left, so a thread that the system holds up
delays nothing but its chunk. The handler waits for chunks that are being worked on, never for a
helper that has yet to start: helpers that come late find nothing to do. For that they share a job
on the heap, which its last user frees.

Structures are those of XLA's c_api.h (FFI API 0.x, as in jaxlib 0.10 and 0.12), whose fields keep
their places between versions.
"""

import ctypes
from typing import Any

import jax
import llvmlite.binding as llvm

# Byte offsets into XLA's structures.
_FRAME_EXTENSION, _FRAME_API, _FRAME_CONTEXT = 8, 16, 24
_FRAME_ARGUMENTS, _FRAME_RESULTS = 72, 112
_API_MAJOR, _API_MINOR, _API_SCHEDULE, _API_NUM_THREADS = 32, 36, 136, 144
_EXTENSION_TYPE, _EXTENSION_METADATA, _METADATA_TYPE = 8, 24, 1
_METADATA_MAJOR, _METADATA_MINOR = 24, 28
_BUFFER_DATA, _BUFFER_DIMS = 24, 40

# Byte offsets into a job: counters, then the buffers.
_JOB_NEXT, _JOB_DONE, _JOB_USERS, _JOB_COUNT, _JOB_BUFFERS = 0, 8, 16, 24, 32
_SPINS_BEFORE_YIELD = 1000


def load(name: str, pointer: str, offset: int, kind: str = "i64") -> str:
    """LLVM text: %name is what lies `offset` bytes behind %pointer."""
    return (
        f"  %{name}.at = getelementptr i8, ptr %{pointer}, i64 {offset}\n"
        f"  %{name} = load {kind}, ptr %{name}.at\n"
    )


def store(name: str, kind: str, value: str, pointer: str, offset: int) -> str:
    """LLVM text: put a value `offset` bytes behind %pointer; `name` must be new."""
    return (
        f"  %{name}.at = getelementptr i8, ptr %{pointer}, i64 {offset}\n"
        f"  store {kind} {value}, ptr %{name}.at\n"
    )


def load_buffer(name: str, index: int, num_dims: int) -> str:
    """LLVM text: %name is the data of a buffer of %buffers, %name.0, %name.1 ... its dimensions."""
    text = load(f"{name}.buffer", "buffers", 8 * index, "ptr")
    text += load(name, f"{name}.buffer", _BUFFER_DATA, "ptr")
    text += load(f"{name}.dims", f"{name}.buffer", _BUFFER_DIMS, "ptr")
    for axis in range(num_dims):
        text += load(f"{name}.{axis}", f"{name}.dims", 8 * axis)
    return text


def register_handler(name: str, kernel: str, num_arguments: int) -> None:
    """Compile a kernel for this machine, and let programs call it by name.

    Call it once, before a program that names it is compiled, or loaded from a cache.

    Args:
        name: For `jax.ffi.ffi_call`; must stand for the same kernel in every process.
        kernel: LLVM text of @count and @chunk, and what they need.
        num_arguments: Before the one result.
    """
    module = llvm.parse_assembly(kernel + _handler_text(num_arguments))
    module.verify()
    engine = llvm.create_mcjit_compiler(module, _target_machine())
    engine.finalize_object()
    _engines.append(engine)
    address = engine.get_function_address("handler")
    jax.ffi.register_ffi_target(name, _capsule(address), platform="cpu")


# Machine code lives as long as its engine.
_engines: list[Any] = []


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )


def _capsule(address: int) -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(address, None, None)


def _handler_text(num_arguments: int) -> str:
    buffers = "".join(
        load(f"argument{index}", "arguments", 8 * index, "ptr")
        + store(f"to{index}", "ptr", f"%argument{index}", "job", _JOB_BUFFERS + 8 * index)
        for index in range(num_arguments)
    )
    buffers += load("result", "results", 0, "ptr") + store(
        "to.result", "ptr", "%result", "job", _JOB_BUFFERS + 8 * num_arguments
    )
    return f"""
declare ptr @malloc(i64)
declare void @free(ptr)
declare i32 @sched_yield()
declare i64 @llvm.smin.i64(i64, i64)

define internal void @work(ptr %job) {{
entry:
{load("count", "job", _JOB_COUNT)}
  %buffers = getelementptr i8, ptr %job, i64 {_JOB_BUFFERS}
  %done = getelementptr i8, ptr %job, i64 {_JOB_DONE}
  br label %claim
claim:
  %index = atomicrmw add ptr %job, i64 1 monotonic
  %has_chunk = icmp slt i64 %index, %count
  br i1 %has_chunk, label %run, label %out
run:
  call void @chunk(ptr %buffers, i64 %index)
  atomicrmw add ptr %done, i64 1 release
  br label %claim
out:
  ret void
}}

define internal void @leave(ptr %job) {{
  %users = getelementptr i8, ptr %job, i64 {_JOB_USERS}
  %before = atomicrmw sub ptr %users, i64 1 acq_rel
  %is_last = icmp eq i64 %before, 1
  br i1 %is_last, label %release, label %out
release:
  call void @free(ptr %job)
  br label %out
out:
  ret void
}}

define internal void @help(ptr %job) {{
  call void @work(ptr %job)
  call void @leave(ptr %job)
  ret void
}}

define ptr @handler(ptr %frame) {{
entry:
{load("extension", "frame", _FRAME_EXTENSION, "ptr")}
{load("api", "frame", _FRAME_API, "ptr")}
  %is_extended = icmp ne ptr %extension, null
  br i1 %is_extended, label %look, label %execute
look:
{load("type", "extension", _EXTENSION_TYPE, "i32")}
  %is_question = icmp eq i32 %type, {_METADATA_TYPE}
  br i1 %is_question, label %describe, label %execute

; XLA asks for which version of the interface this was made: for the one that asks.
describe:
{load("metadata", "extension", _EXTENSION_METADATA, "ptr")}
{load("major", "api", _API_MAJOR, "i32")}
{load("minor", "api", _API_MINOR, "i32")}
{store("to.major", "i32", "%major", "metadata", _METADATA_MAJOR)}
{store("to.minor", "i32", "%minor", "metadata", _METADATA_MINOR)}
  ret ptr null

execute:
{load("context", "frame", _FRAME_CONTEXT, "ptr")}
{load("arguments", "frame", _FRAME_ARGUMENTS, "ptr")}
{load("results", "frame", _FRAME_RESULTS, "ptr")}
{load("ask_threads", "api", _API_NUM_THREADS, "ptr")}
{load("schedule", "api", _API_SCHEDULE, "ptr")}
  %job = call ptr @malloc(i64 {_JOB_BUFFERS + 8 * (num_arguments + 1)})
{buffers}
  %buffers = getelementptr i8, ptr %job, i64 {_JOB_BUFFERS}
  %count = call i64 @count(ptr %buffers)
  %threads.at = alloca i64
  store i64 1, ptr %threads.at
  %question = alloca [5 x i64]
  store i64 32, ptr %question
{store("no.extension", "ptr", "null", "question", 8)}
{store("to.context", "ptr", "%context", "question", 16)}
{store("to.threads", "ptr", "%threads.at", "question", 24)}
  %no.pool = call ptr %ask_threads(ptr %question)
  %threads = load i64, ptr %threads.at
  %users = call i64 @llvm.smin.i64(i64 %threads, i64 %count)
  %helpers = sub i64 %users, 1
{store("to.next", "i64", "0", "job", _JOB_NEXT)}
{store("to.done", "i64", "0", "job", _JOB_DONE)}
{store("to.users", "i64", "%users", "job", _JOB_USERS)}
{store("to.count", "i64", "%count", "job", _JOB_COUNT)}
  store i64 40, ptr %question
{store("to.task", "ptr", "@help", "question", 24)}
{store("to.data", "ptr", "%job", "question", 32)}
  br label %call
call:
  %called = phi i64 [0, %execute], [%called.next, %call.one]
  %more = icmp slt i64 %called, %helpers
  br i1 %more, label %call.one, label %work
call.one:
  %refused = call ptr %schedule(ptr %question)
  %called.next = add i64 %called, 1
  br label %call
work:
  call void @work(ptr %job)
  br label %wait
wait:
  %spins = phi i64 [0, %work], [%spins.next, %spin], [0, %yield]
  %done = load atomic i64, ptr %to.done.at acquire, align 8
  %is_done = icmp sge i64 %done, %count
  br i1 %is_done, label %end, label %spin
spin:
  %spins.next = add i64 %spins, 1
  %is_long = icmp sgt i64 %spins.next, {_SPINS_BEFORE_YIELD}
  br i1 %is_long, label %yield, label %wait
yield:
  %ignored = call i32 @sched_yield()
  br label %wait
end:
  call void @leave(ptr %job)
  ret ptr null
}}
"""
