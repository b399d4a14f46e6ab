//! The device layer over the NVIDIA driver, on any machine: a child process gets a fake driver and a fake cuBLASLt (`fake_driver.cpp`)
//! through `LD_LIBRARY_PATH`, and says how it fared.
//!
//! In a build without nvcc the device must fail with the line that says so; what `doctor` finds is tested in every build.

#[path = "cuda/fakes.rs"]
mod fakes;
#[path = "cuda/ranks.rs"]
mod ranks;
#[path = "cuda/scenarios.rs"]
mod scenarios;
#[path = "cuda/shared_steps.rs"]
mod shared_steps;
#[path = "cuda/tuning.rs"]
mod tuning;

use fakes::{Libraries, child, doctor};
use retromae_engine::device::Device;

/// Settings of the fakes.
type Variables = &'static [(&'static str, &'static str)];

/// Libraries and settings under which the GPU cannot be used, what is then said, and what to do.
const REFUSALS: [(&str, Libraries, Variables, &str, &str); 11] = [
    ("no driver", Libraries::None, &[], "there is no NVIDIA driver (libcuda.so.1)", "--device cpu"),
    (
        "an old driver",
        Libraries::Both,
        &[("FAKE_VERSION", "11080")],
        "the NVIDIA driver is one of CUDA 11.8, older than 12.0",
        "update the NVIDIA driver",
    ),
    (
        "a function is missing",
        Libraries::Lacking,
        &[],
        "the NVIDIA driver has no function cuGraphLaunch",
        "update the NVIDIA driver",
    ),
    ("no GPU", Libraries::Both, &[("FAKE_GPUS", "0")], "the NVIDIA driver finds no GPU", "nvidia-smi"),
    (
        "no GPU, by code",
        Libraries::Both,
        &[("FAKE_FAIL", "cuInit:100")],
        "the NVIDIA driver finds no GPU",
        "nvidia-smi",
    ),
    (
        "a driver that does not start",
        Libraries::Both,
        &[("FAKE_FAIL", "cuInit:803")],
        "initialising the NVIDIA driver: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (what the fake was told to say)",
        "restart the machine",
    ),
    (
        "an old GPU",
        Libraries::Both,
        &[("FAKE_CAPABILITY", "75")],
        "Fake GPU has compute capability 7.5, and the kernels need 8.0 or newer",
        "use a GPU from Ampere on",
    ),
    (
        "no cuBLASLt",
        Libraries::Driver,
        &[],
        "cuBLASLt, the library for matrix products, is not there",
        "pip install nvidia-cublas in the active Python environment",
    ),
    (
        "no cuBLASLt beside an older driver",
        Libraries::Driver,
        &[("FAKE_VERSION", "12040")],
        "cuBLASLt, the library for matrix products, is not there",
        "pip install nvidia-cublas-cu12",
    ),
    (
        "an old cuBLASLt",
        Libraries::Both,
        &[("FAKE_LIBRARY", "11402")],
        "cuBLASLt 11.4.2 is older than 12.0.0",
        "pip install nvidia-cublas",
    ),
    (
        "a cuBLASLt newer than the driver",
        Libraries::Both,
        &[("FAKE_VERSION", "12040")],
        "cuBLASLt 13.1.0 needs a driver of CUDA 13, this one is of 12.4",
        "pip install nvidia-cublas-cu12",
    ),
];

/// Whether the test can take this machine's own cuBLASLt out of sight.
fn can_hide(libraries: Libraries) -> bool {
    let toolkit = std::fs::read_dir("/usr/local/cuda/lib64").into_iter().flatten().flatten();
    let mut names = toolkit.map(|entry| entry.file_name());
    let there = libraries == Libraries::Driver && names.any(|name| name.to_string_lossy().starts_with("libcublasLt"));
    if there {
        println!("left out: the machine's own cuBLASLt in /usr/local/cuda cannot be hidden");
    }
    !there
}

#[test]
fn what_is_missing_is_one_line_with_what_to_do() {
    for (what, libraries, variables, cause, remedy) in REFUSALS.into_iter().filter(|r| can_hide(r.1)) {
        let Some(said) = child("open", libraries, variables) else { continue };
        let [line] = said.lines.as_slice() else { panic!("{what}: {:?}", said.lines) };
        assert!(line.starts_with(&format!("error: {cause}; ")) && line.contains(remedy), "{what}: {line}");
    }
}

#[test]
fn doctor_finds_what_is_missing_and_never_fails() {
    for (what, libraries, variables, cause, remedy) in REFUSALS.into_iter().filter(|r| can_hide(r.1)) {
        let told = doctor(libraries, variables);
        let mut lines = told.lines();
        let found = lines.find(|line| line.starts_with("--  ") && line.ends_with(cause));
        assert!(found.is_some(), "{what}: {told}");
        assert!(lines.next().is_some_and(|line| line.contains(remedy)), "{what}: {told}");
    }
}

#[test]
fn doctor_tells_what_is_there() {
    let told = doctor(Libraries::Both, &[]);
    for (what, found) in [
        ("CUDA driver", "CUDA 13.0"),
        ("GPU", "Fake GPU, compute capability 9.0, 4 multiprocessors, 1.0 GiB"),
        ("cuBLASLt", "13.1.0"),
    ] {
        assert!(told.contains(&format!("ok  {what:<12} {found}\n")), "{what}: {told}");
    }
    let kernels = match fakes::NO_KERNELS {
        Some(why) => format!("--  {:<12} {}\n", "GPU kernels", why.split_once("; ").unwrap().0),
        None => format!("ok  {:<12} for compute capability 8.0", "GPU kernels"),
    };
    assert!(told.contains(&kernels), "{told}");
}

#[test]
fn auto_takes_the_gpu_or_says_why_not() {
    let says = |libraries, variables: &[_], expected: &str| {
        if let Some(said) = child("auto", libraries, variables) {
            assert_eq!(said.lines, [expected]);
        }
    };
    says(Libraries::Both, &[], "Gpu(Fake GPU)");
    let told =
        "Cpu, running on the CPU: the NVIDIA driver is one of CUDA 11.8, older than 12.0; update the NVIDIA driver";
    says(Libraries::Both, &[("FAKE_VERSION", "11080")], told);
    // A machine that was never meant to have one is told nothing, in any build.
    assert_eq!(fakes::child_of_any_build("auto", Libraries::None, &[]).lines, ["Cpu"]);
}

#[test]
fn cublaslt_of_pip_is_found_in_the_active_environment() {
    let environment = fakes::environment_with_cublaslt();
    let path = environment.path().to_str().unwrap();
    let Some(said) = child("open", Libraries::Driver, &[("VIRTUAL_ENV", path)]) else { return };
    assert_eq!(said.lines, ["Fake GPU, (9, 0), 4, 232448, 1073741824, driver CUDA 13.0, cuBLASLt 13.1.0"]);
}

#[test]
fn the_driver_is_called_in_the_right_order() {
    let Some(said) = child("sequence", Libraries::Both, &[]) else { return };
    assert_eq!(
        said.lines,
        ["products [7.0, 10.0, 15.0, 22.0] [7.0, 10.0, 15.0, 22.0], reductions 5, queued 8, same GPU true"]
    );
    let opened = ["cuDriverGetVersion", "cuInit", "cuDevicePrimaryCtxRetain", "cuStreamCreate 1", "cublasLtCreate"];
    let first: Vec<&String> = said.log.iter().filter(|line| opened.contains(&line.as_str())).collect();
    assert_eq!(first, opened, "opened once");
    let work = said.log.iter().skip_while(|line| *line != "-- work");
    let expected = [
        "-- work",
        // Two tensors, one on top of the other in one locked piece.
        "cuMemAlloc_v2 16",
        "cuMemsetD8Async 16",
        "cuMemHostAlloc 16777216",
        "cuMemcpyHtoDAsync_v2 16",
        "cuMemAlloc_v2 16",
        "cuMemsetD8Async 16",
        "cuMemcpyHtoDAsync_v2 16",
        "cuMemAlloc_v2 16",
        "cuMemsetD8Async 16",
        "cuMemAlloc_v2 16",
        "cuMemsetD8Async 16",
        // A kernel, loaded at its first launch.
        "cuModuleLoadDataEx machine code",
        "cuModuleGetFunction conformance_reductions",
        "cuFuncGetAttribute 1",
        "cuLaunchKernel conformance_reductions 1 1 1, 32 1 1, 0",
        // A product, whose algorithm is chosen once.
        "cublasLtMatmulDescCreate 68 0",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulAlgoGetHeuristic 8",
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmul 2 x 2 x 2",
        "cublasLtMatmul 2 x 2 x 2",
        // Reading waits.
        "cuMemHostAlloc 16777216",
        "cuMemcpyDtoHAsync_v2 16",
        "cuStreamSynchronize",
        // A capture, in relaxed mode, with a kernel that is new to it.
        "cuStreamBeginCapture_v2 2",
        "cuModuleGetFunction conformance_ldmatrix",
        "cuFuncGetAttribute 1",
        "cuLaunchKernel conformance_ldmatrix 1 1 1, 32 1 1, 0",
        "cuMemsetD8Async 16",
        "cublasLtMatmul 2 x 2 x 2",
        "cuLaunchKernel conformance_reductions 1 1 1, 32 1 1, 0",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags 4",
        "cuGraphDestroy",
        // Memory that was given back meanwhile.
        "cuStreamSynchronize",
        "cuMemFree_v2 ",
        "cuEventCreate",
        "cuEventRecord",
        "cuGraphLaunch",
        "cuGraphLaunch",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventSynchronize",
        "cuEventElapsedTime",
        "cuMemcpyDtoHAsync_v2 16",
        "cuStreamSynchronize",
        "cuMemcpyDtoHAsync_v2 16",
        "cuStreamSynchronize",
        "cuEventDestroy_v2",
        "cuEventDestroy_v2",
        "cuGraphExecDestroy",
        "cuStreamSynchronize",
        "cuMemFree_v2 ",
        "cuStreamSynchronize",
        "cuMemFree_v2 ",
        "cuStreamSynchronize",
        "cuMemFree_v2 ",
    ];
    let work: Vec<&String> = work.collect();
    assert_eq!(work, expected, "{work:#?}");
}

/// What a capture of the driver's replays is what is queued piece by piece, round after round, each with the numbers of its own.
#[test]
fn replays_equal_work_as_it_comes() {
    let Some(said) = child("records", Libraries::Both, &[]) else { return };
    // 1 + 4 + 9 + 16 + 25 times the product of the first numbers; the first round is queued as it comes. Three pieces a round take time.
    assert_eq!(said.lines, ["[275.0, 605.0, 605.0, 1375.0], [5.0]: 4 replays, 15 times"]);
    let count = |call: &str| said.log.iter().filter(|line| line.starts_with(call)).count();
    assert_eq!((count("cuStreamBeginCapture_v2"), count("cuGraphLaunch")), (1, 4));
    assert_eq!(
        (count("cuEventRecord"), count("cuEventDestroy_v2")),
        (5 * 5, 5 * 5),
        "five marks a round, each given back"
    );
}

#[test]
fn gpus_without_machine_code_and_drivers_that_refuse_it_get_ptx() {
    let (code, ptx) = ("machine code", |target: &str| format!(".target {target}"));
    for (variables, expected) in [
        (vec![("FAKE_CAPABILITY", "86")], vec![code.to_string()]),
        (vec![("FAKE_CAPABILITY", "120")], vec![ptx("sm_80")]),
        (vec![("FAKE_CAPABILITY", "89"), ("FAKE_OLD", "1")], vec![code.to_string(), ptx("sm_80")]),
        (vec![("FAKE_OLD", "1")], vec![code.to_string(), ptx("sm_90a")]),
    ] {
        let Some(said) = child("launch", Libraries::Both, &variables) else { return };
        assert_eq!(said.lines, ["fine"]);
        let loaded: Vec<&str> = said.log.iter().filter_map(|line| line.strip_prefix("cuModuleLoadDataEx ")).collect();
        assert_eq!(loaded, expected, "{variables:?}");
    }
}

#[test]
fn products_of_rows_agree_with_their_definition() {
    let Some(said) = child("products", Libraries::Both, &[]) else { return };
    assert_eq!(said.lines, ["180 products agree"]);
}

#[test]
fn uploads_keep_their_content_until_they_are_done() {
    let Some(said) = child("uploads", Libraries::Both, &[]) else { return };
    assert_eq!(said.lines, ["fine"]);
    // The pieces are waited for by their events, never by waiting for all work.
    let uploads = said.log.iter().skip_while(|line| *line != "-- uploads").take_while(|line| *line != "-- downloads");
    let uploads: Vec<&String> = uploads.collect();
    assert!(uploads.iter().any(|line| *line == "cuEventSynchronize"), "{uploads:?}");
    assert!(!uploads.iter().any(|line| *line == "cuStreamSynchronize"), "{uploads:?}");
}

#[test]
fn results_are_read_while_the_next_inputs_are_queued() {
    let Some(said) = child("results", Libraries::Both, &[]) else { return };
    assert_eq!(said.lines, ["[3.0, 11.0, 7.0]"]);
    let from = said.log.iter().skip_while(|line| *line != "-- step 2").take_while(|line| *line != "-- end");
    let expected = [
        "-- step 2",
        "cuLaunchKernel conformance_reductions 1 1 1, 32 1 1, 0",
        "cuMemcpyDtoHAsync_v2 4",
        "cuEventRecord",
        "cuMemcpyHtoDAsync_v2 4",
        "cuMemcpyHtoDAsync_v2 4",
        // The results alone are waited for, not the uploads behind them.
        "cuEventSynchronize",
    ];
    assert_eq!(from.collect::<Vec<_>>(), expected);
}

#[test]
fn a_step_fails_with_one_line_and_exit_code_1() {
    for (what, libraries, variables, cause, _) in REFUSALS.into_iter().filter(|r| can_hide(r.1)).take(2) {
        let (code, err) = fakes::step(libraries, variables).0;
        let expected = fakes::NO_KERNELS.unwrap_or(cause);
        assert_eq!((code, err.lines().count()), (Some(1), 1), "{what}: {err}");
        assert!(err.starts_with(&format!("error: {expected}")), "{what}: {err}");
    }
}

#[test]
fn a_whole_step_makes_calls_that_the_driver_accepts() {
    if fakes::NO_KERNELS.is_some() {
        return println!("left out: built without nvcc");
    }
    let ((code, err), log) = fakes::step(Libraries::Both, &[("FAKE_MEMORY", "4000000000")]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let count = |name: &str| log.lines().filter(|line| line.starts_with(name)).count();
    assert!(count("cuLaunchKernel ") > 50 && count("cublasLtMatmul ") > 30, "{log}");
    assert_eq!(count("cuMemFree_v2 early"), 0, "memory is given back when nothing uses it any more");
}

/// Scenarios in which a call fails, and what is then said.
const FAILURES: [(&str, Variables, &str); 14] = [
    (
        "memory",
        &[],
        "error: out of memory: 3.00 GiB wanted, 0.94 of 1.00 GiB free on Fake GPU; use a smaller batch and accumulate, or a smaller \
         model; train --dry-run tells what a run needs",
    ),
    (
        "shared",
        &[("FAKE_SHARED", "101376"), ("FAKE_CAPABILITY", "86")],
        "error: kernel conformance_reductions wants 200000 bytes of shared memory a block, Fake GPU has 101376; use a model with \
         another head size, another --precision or another GPU",
    ),
    ("shared", &[], "fine"),
    (
        "threads",
        &[],
        "error: kernel conformance_reductions: 2 parameters and 2048 threads, it takes 2 and at most 1024; correct the launch",
    ),
    (
        "launch",
        &[("FAKE_FAIL", "cuLaunchKernel:701")],
        "error: kernel conformance_reductions (grid 1 x 1 x 1, block 32 x 1 x 1, 0 bytes of shared memory): \
         CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (what the fake was told to say); report this with the command",
    ),
    (
        "launch",
        &[("FAKE_FAIL", "cuModuleLoadDataEx:218")],
        "error: loading the kernels of conformance.cu (ptxas fatal : no such instruction): CUDA_ERROR_INVALID_PTX (what the fake was \
         told to say); report this with the command",
    ),
    (
        "launch",
        &[("FAKE_FAIL", "cuModuleLoadDataEx:222")],
        "error: loading the kernels of conformance.cu (ptxas fatal : no such instruction): CUDA_ERROR_UNSUPPORTED_PTX_VERSION (what \
         the fake was told to say); update the NVIDIA driver",
    ),
    (
        "launch",
        &[("FAKE_LATE", "conformance_reductions:700")],
        "error: waiting for the GPU: CUDA_ERROR_ILLEGAL_ADDRESS (what the fake was told to say); this may be of work queued before: run \
         again with RETROMAE_SYNC=1, which names the kernel at fault, and report it",
    ),
    (
        "results",
        &[("FAKE_LATE", "conformance_reductions:700")],
        "error: copying from the GPU: CUDA_ERROR_ILLEGAL_ADDRESS (what the fake was told to say); this may be of work queued before: run \
         again with RETROMAE_SYNC=1, which names the kernel at fault, and report it",
    ),
    (
        "launch",
        &[("FAKE_LATE", "conformance_reductions:700"), ("RETROMAE_SYNC", "1")],
        "error: kernel conformance_reductions (grid 1 x 1 x 1, block 32 x 1 x 1, 0 bytes of shared memory): \
         CUDA_ERROR_ILLEGAL_ADDRESS (what the fake was told to say); this is a defect of the engine; report it with the command",
    ),
    (
        "replay",
        &[("FAKE_LATE", "conformance_reductions:719"), ("RETROMAE_SYNC", "1")],
        "error: kernel conformance_reductions (grid 1 x 1 x 1, block 32 x 1 x 1, 0 bytes of shared memory): \
         CUDA_ERROR_LAUNCH_FAILED (what the fake was told to say); this is a defect of the engine; report it with the command",
    ),
    (
        "replay",
        &[("FAKE_FAIL", "cuStreamEndCapture:901")],
        "error: ending a capture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (what the fake was told to say); report this with the command",
    ),
    (
        "product",
        &[("FAKE_FAIL", "cublasLtMatmulAlgoGetHeuristic:15")],
        "error: cuBLASLt has no algorithm for the product c [2, 3] F32 = a [2, 4] F32 · b [3, 4]ᵀ F32, strides 4, 4, 3; install a newer \
         cuBLASLt (pip install -U nvidia-cublas), or use another --precision",
    ),
    (
        "product",
        &[("FAKE_FAIL", "cublasLtMatmul:13")],
        "error: product c [2, 3] F32 = a [2, 4] F32 · b [3, 4]ᵀ F32, strides 4, 4, 3: CUBLAS_STATUS_EXECUTION_FAILED; this may be of \
         work queued before: run again with RETROMAE_SYNC=1, which names the kernel at fault, and report it",
    ),
];

#[test]
fn failures_name_what_failed() {
    for (scenario, variables, expected) in FAILURES {
        let Some(said) = child(scenario, Libraries::Both, variables) else { continue };
        assert_eq!(said.lines, [expected], "{scenario} with {variables:?}");
    }
}

/// What children run; without a scenario the devices that every machine has.
#[test]
fn scenario() {
    if let Ok(name) = std::env::var(fakes::SCENARIO) {
        return scenarios::run(&name);
    }
    assert!(matches!(Device::open("cpu"), Ok((Device::Cpu, None))));
    assert!(Device::open("emulator").is_ok_and(|(device, told)| device.is_gpu() && told.is_none()));
    assert_eq!(Device::open("tpu").unwrap_err().exit_code(), 2);
}
