//! Planted bugs (`bugs.cu`): each is found by the builds that promise to find it, and correct kernels raise nothing anywhere.

use crate::libraries;
use crate::support::{Buffer, every_order};
use retromae_engine::device::emulator::{Asynchronous, Emulator, LIBRARY_VARIABLE, Options};
use retromae_engine::device::launch::{Kernel, Launcher, Module, Shape, TensorLayout};
use std::ffi::c_void;
use std::process::Command;

static BUGS: Module = Module { name: "bugs", ptx_sm80: None, cubin_sm80: None, ptx_sm90a: None, cubin_sm90a: None };

/// How a build finds a bug.
#[derive(Clone, Copy, PartialEq)]
enum Found {
    /// The launch fails (or, under the sanitizers, the process) with a message that holds this text.
    Error(&'static str),
    /// Results are NaN or differ between orders.
    Results,
    /// Not at all: the bug is another build's business.
    No,
}
use Found::{Error, No, Results};

/// A kernel of `bugs.cu`: parameters (`o`, then `x` and `n` where it takes them), and what each build makes of it.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    takes_x: bool,
    n: Option<i32>,
    threads: u32,
    blocks: u32,
    shared_bytes: u32,
    watchdog_ms: u32,
    plain: Found,
    check: Found,
    asan: Found,
}

/// One block of 64 threads with 256 bytes of shared memory, found alike by all builds.
const fn case(name: &'static str, found: Found) -> Case {
    let (plain, check, asan) = (found, found, found);
    Case {
        name,
        takes_x: false,
        n: None,
        threads: 64,
        blocks: 1,
        shared_bytes: 256,
        watchdog_ms: 60_000,
        plain,
        check,
        asan,
    }
}

impl Case {
    const fn x(self) -> Case {
        Case { takes_x: true, shared_bytes: 2048, ..self }
    }
    const fn n(self, n: i32) -> Case {
        Case { n: Some(n), ..self }
    }
    const fn blocks(self, blocks: u32) -> Case {
        Case { blocks, ..self }
    }
    const fn watchdog(self, watchdog_ms: u32) -> Case {
        Case { watchdog_ms, ..self }
    }
    const fn product(self) -> Case {
        Case { threads: 128, shared_bytes: 16384, ..self }
    }
    const fn check(self, check: Found) -> Case {
        Case { check, ..self }
    }
    const fn asan(self, asan: Found) -> Case {
        Case { asan, ..self }
    }
}

const CASES: &[Case] = &[
    case("bug_divergent_barrier", Error("divergent barrier: __syncthreads at tests/emulator/bugs.cu:")),
    case("bug_exit_before_barrier", Error("ended")),
    case("bug_partial_shuffle", Error("deadlock: ")),
    case("bug_shuffle_outside_mask", Error("reads lane 20, which is not in mask")),
    case("bug_divergent_warp", Error("divergent warp: ")),
    case("bug_mbarrier_deadlock", Error("64 thread(s) (first: 0) wait in mbarrier wait at tests/emulator/bugs.cu:")),
    case("bug_endless_loop", Error("the watchdog stopped it")).n(1).watchdog(300),
    case("bug_endless_barriers", Error("the watchdog stopped it")).n(1).watchdog(300),
    case("bug_stack_overflow", Error("illegal address")).n(100_000).asan(Error("stack-overflow")),
    // Past the end by one, before the start by one, far past the end.
    case("bug_dynamic_overrun", Error("past the end of dynamic"))
        .n(1)
        .check(Error("shared write out of bounds"))
        .asan(Error("use-after-poison")),
    case("bug_dynamic_overrun", Error("before the start of dynamic"))
        .n(-1)
        .check(Error("shared write out of bounds"))
        .asan(Error("use-after-poison")),
    case("bug_dynamic_overrun", Error("illegal address")).n(4000).asan(Error("SEGV")),
    case("bug_static_overrun", Error("past the end of a static"))
        .n(1)
        .check(Error("shared write out of bounds"))
        .asan(Error("out of bounds for type")),
    case("bug_global_read", Error("illegal address")).x().n(1024).asan(Error("heap-buffer-overflow")),
    case("bug_global_write", Error("illegal address")).n(128).asan(Error("heap-buffer-overflow")),
    case("bug_misaligned", No).x().asan(Error("misaligned address")),
    case("bug_int_overflow", No).n(9000).asan(Error("signed integer overflow")),
    case("bug_uninitialised_shared", Results)
        .check(Error("read of uninitialised shared memory: dynamic shared memory +0x14")),
    case("bug_read_after_write", Results).check(Error("race (")),
    case("bug_write_after_read", Results).check(Error("race (")),
    case("bug_write_after_write", Results).check(Error("race (write after write)")),
    case("bug_inside_warp", Results).check(Error("race (write after read)")),
    case("bug_between_blocks", No).blocks(4).check(Error("race between blocks (write after write)")),
    case("bug_read_then_overwritten", No).blocks(2).check(Error("race between blocks (write after read)")),
    case("bug_copy_without_wait", Results).x().check(Error("read during an asynchronous copy")),
    case("bug_copy_without_barrier", Results).x().check(Error("race (read after write)")),
    case("bug_copy_not_drained", Error("thread ends with cp.async still in flight")).x(),
    case("bug_copy_misaligned", Error("is not 16-byte aligned")).x(),
    case("bug_no_trailing_barrier", Results).x().check(Error("during an asynchronous copy")),
    case("bug_no_wgmma_wait", Results).product(),
    case("bug_no_proxy_fence", No).product().check(Error("without fence.proxy.async")),
    case("ok_inside_warp", No),
    case("ok_neighbouring_bytes", No),
    case("ok_producer_consumer", No),
    case("ok_copy_with_wait", No).x(),
    case("ok_trailing_barrier", No).x(),
    case("ok_product", No).product(),
];

/// Output of one launch; `o` has 128 elements and begins as zeros, `x` has 1024.
fn launch(device: &Emulator, case: &Case) -> Result<Vec<f32>, String> {
    let o = Buffer::from(device, &[0f32; 128]);
    let x = Buffer::from(device, &(0..1024).map(|i| i as f32).collect::<Vec<_>>());
    let (o_address, x_address, n) = (o.get_mut(), x.get(), case.n.unwrap_or(0));
    let mut params: Vec<*const c_void> = vec![(&raw const o_address).cast()];
    let mut sizes = vec![8];
    if case.takes_x {
        params.push((&raw const x_address).cast());
        sizes.push(8);
    }
    if case.n.is_some() {
        params.push((&raw const n).cast());
        sizes.push(4);
    }
    let kernel =
        Kernel { name: case.name, module: &BUGS, param_sizes: sizes.leak(), max_threads: 1024, emulated: None };
    let shape = Shape::linear(case.blocks, case.threads).shared(case.shared_bytes);
    // SAFETY: the parameters are those of the kernel; what it does wrong with them is what the test is about.
    unsafe { device.launch(&kernel, shape, &params) }.map_err(|e| e.to_string())?;
    Ok(o.read())
}

/// Runs the case in several orders; the first error ends it.
fn observe(device: &Emulator, case: &Case) -> Result<Found, String> {
    let mut outputs = Vec::new();
    for asynchronous in [Asynchronous::Late, Asynchronous::AtIssue, Asynchronous::Random] {
        for seed in 0..6 {
            // One thread: what blocks do to each other must not depend on the machine.
            let options =
                Options { seed, asynchronous, threads: 1, watchdog_ms: case.watchdog_ms, ..Options::default() };
            outputs.push(launch(&device.with(options), case)?);
        }
    }
    let bits = |output: &[f32]| output.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let nan = outputs.iter().flatten().any(|v| v.is_nan());
    let differ = outputs.iter().any(|output| bits(output) != bits(&outputs[0]));
    Ok(if nan || differ { Results } else { No })
}

fn run_all(device: &Emulator, expected: impl Fn(&Case) -> Found) {
    let mut wrong = Vec::new();
    for case in CASES {
        let as_expected = match (observe(device, case), expected(case)) {
            (Err(message), Error(text)) if message.contains(text) && !message.contains('\n') => continue,
            (Ok(found), want) if found == want => continue,
            (Err(message), _) => message,
            (Ok(Results), _) => "results are NaN or differ".to_string(),
            (Ok(_), _) => "nothing found".to_string(),
        };
        wrong.push(format!("{} (n = {:?}): {as_expected}", case.name, case.n));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_plain_build_finds_its_bugs() {
    let device = Emulator::from_library(libraries::plain(), Options::default()).expect("it loads");
    assert_eq!(device.variant(), "plain");
    run_all(&device, |case| case.plain);
}

#[test]
fn the_check_build_finds_races_and_uninitialised_memory() {
    let device = Emulator::from_library(libraries::check(), Options::default()).expect("it loads");
    assert_eq!(device.variant(), "check");
    run_all(&device, |case| case.check);
}

#[test]
fn the_check_build_names_line_and_both_threads() {
    let device = Emulator::from_library(libraries::check(), Options::default()).expect("it loads");
    let race = CASES.iter().find(|c| c.name == "bug_read_after_write").expect("it is in the table");
    let message = launch(&device, race).expect_err("it is found");
    assert!(message.contains("block (0,0,0) thread (0,0,0)"), "{message}");
    assert!(message.contains("with thread 32") || message.contains("with thread 0"), "{message}");
    assert!(message.contains("tests/emulator/bugs.cu:"), "{message}");
}

#[test]
fn global_memory_that_nobody_wrote_is_reported() {
    let device = Emulator::from_library(libraries::check(), Options::default()).expect("it loads");
    let o = Buffer::from(&device, &[0f32; 64]);
    let x: Buffer<f32> = Buffer::new(&device, 64);
    let (o, x, n) = (o.get_mut(), x.get(), 1i32);
    let kernel = Kernel {
        name: "bug_uninitialised_global",
        module: &BUGS,
        param_sizes: &[8, 8, 4],
        max_threads: 1024,
        emulated: None,
    };
    let params = [(&raw const o).cast(), (&raw const x).cast(), (&raw const n).cast()];
    // SAFETY: the parameters are those of the kernel.
    let error = unsafe { device.launch(&kernel, Shape::linear(1, 64), &params) }.expect_err("it is found").to_string();
    assert!(error.contains("read of uninitialised global memory: byte 0 of a buffer of 256 bytes"), "{error}");
}

/// Output of a kernel that sums four tiles which TMA brings: x [128, 32] in boxes of [32, 32].
fn launch_ring(device: &Emulator, name: &'static str) -> Result<Vec<f32>, String> {
    let x = Buffer::from(device, &(0..128 * 32).map(|i| (i / 32 + i % 32) as f32).collect::<Vec<_>>());
    let o = Buffer::from(device, &[0f32; 32]);
    let layout = TensorLayout {
        base: x.address(),
        width: 32,
        height: 128,
        row_bytes: 128,
        box_width: 32,
        box_height: 32,
        element_bytes: 4,
        swizzle_128b: false,
    };
    let (o_address, map) = (o.get_mut(), device.tensor_map(&layout).expect("the layout is aligned"));
    let kernel = Kernel { name, module: &BUGS, param_sizes: &[8, 128], max_threads: 64, emulated: None };
    let params = [(&raw const o_address).cast(), (&raw const map).cast()];
    // SAFETY: the parameters are those of the kernel.
    unsafe { device.launch(&kernel, Shape::linear(1, 64).shared(4096 + 16), &params) }.map_err(|e| e.to_string())?;
    Ok(o.read())
}

#[test]
fn a_ring_without_its_empty_barrier_is_found() {
    let plain = Emulator::from_library(libraries::plain(), Options::default()).expect("it loads");
    let check = Emulator::from_library(libraries::check(), Options::default()).expect("it loads");
    // Column c of row r holds r + c, and each lane sums every column class once a tile: rows sum to 128 * 127 / 2.
    let good = launch_ring(&plain, "ok_empty_wait").expect("a correct kernel raises nothing");
    for (lane, sum) in good.iter().enumerate() {
        let columns: usize = (0..128).map(|row| lane ^ (row % 32 / 8 * 8)).sum();
        assert_eq!(*sum, (128 * 127 / 2 + columns) as f32, "lane {lane}");
    }
    for options in every_order() {
        assert_eq!(launch_ring(&plain.with(options), "ok_empty_wait").as_ref(), Ok(&good), "{options:?}");
        assert_eq!(launch_ring(&check.with(options), "ok_empty_wait").as_ref(), Ok(&good), "{options:?}");
    }
    let outcomes: Vec<_> =
        every_order().into_iter().map(|o| launch_ring(&plain.with(o), "bug_no_empty_wait")).collect();
    assert!(
        outcomes.iter().any(|outcome| outcome.as_ref() != Ok(&good)),
        "the plain build computes as if nothing were wrong"
    );
    let message = launch_ring(&check, "bug_no_empty_wait").expect_err("the checker finds it");
    // Seen as a second arrival in a phase, as a read of a tile in flight, or as a race, whichever comes first.
    let signs = ["more arrivals than its count", "asynchronous copy", "race ("];
    assert!(signs.iter().any(|sign| message.contains(sign)), "{message}");
}

/// Says to [`one_case_in_a_process_of_its_own`] which case of the table to run.
const CASE_VARIABLE: &str = "RETROMAE_TEST_EMULATOR_CASE";

/// Sanitizers end the process at the first finding, so the test below runs this one in children. By itself it runs a correct kernel.
#[test]
fn one_case_in_a_process_of_its_own() {
    let index = std::env::var(CASE_VARIABLE).ok().and_then(|text| text.parse::<usize>().ok());
    let case = match index {
        Some(index) => &CASES[index],
        None => CASES.iter().find(|c| c.name == "ok_trailing_barrier").expect("it is in the table"),
    };
    let device = match std::env::var_os(LIBRARY_VARIABLE) {
        Some(path) => Emulator::from_library(path.as_ref(), Options::default()),
        None => Emulator::from_library(libraries::plain(), Options::default()),
    }
    .expect("it loads");
    match observe(&device, case) {
        Ok(found) => assert!(found == if index.is_some() { case.asan } else { No }, "not as the table says"),
        Err(message) => panic!("{message}"),
    }
}

#[test]
fn the_sanitizers_find_their_bugs() {
    let (library, preload) = (libraries::asan(), libraries::preload());
    let program = std::env::current_exe().expect("the test program has a path");
    let mut wrong = Vec::new();
    for (index, case) in CASES.iter().enumerate() {
        let done = Command::new(&program)
            .args(["--exact", "bugs::one_case_in_a_process_of_its_own", "--nocapture", "--test-threads=1"])
            .env(LIBRARY_VARIABLE, library)
            .env(CASE_VARIABLE, index.to_string())
            .env("LD_PRELOAD", &preload)
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .output()
            .expect("the test program runs");
        let printed = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        let as_expected = match case.asan {
            Error(text) => !done.status.success() && printed.contains(text),
            Results | No => done.status.success() && printed.contains("1 passed"),
        };
        if !as_expected {
            wrong.push(format!("{} (n = {:?}): {printed}", case.name, case.n));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_failed_launch_leaves_the_device_usable() {
    let device = Emulator::from_library(libraries::plain(), Options::default()).expect("it loads");
    let named = |name: &str| CASES.iter().find(|c| c.name == name).expect("it is in the table");
    let failing = [
        "bug_divergent_barrier",
        "bug_exit_before_barrier",
        "bug_mbarrier_deadlock",
        "bug_global_read",
        "bug_stack_overflow",
    ];
    for round in 0..100 {
        let device = device.with(Options { seed: round % 5, threads: 1 + round as u32 % 2, ..Options::default() });
        let bug = Case { blocks: 8, ..*named(failing[round as usize % failing.len()]) };
        assert!(launch(&device, &bug).is_err(), "round {round}: {} was not found", bug.name);
        let good = launch(&device, named("ok_inside_warp")).expect("the launch after a failed one succeeds");
        assert!((0..64).all(|i| good[i] == (i ^ 1) as f32), "round {round}: wrong results after {}", bug.name);
    }
}

#[test]
fn threads_may_launch_at_the_same_time() {
    let device = Emulator::from_library(libraries::plain(), Options::default()).expect("it loads");
    let named = |name: &str| CASES.iter().find(|c| c.name == name).expect("it is in the table");
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let device = device.with(Options { seed, ..Options::default() });
            scope.spawn(move || {
                for _ in 0..50 {
                    let error =
                        launch(&device, named("bug_divergent_barrier")).expect_err("each thread gets its own error");
                    assert!(error.contains("bug_divergent_barrier"), "{error}");
                    assert!(launch(&device, named("ok_trailing_barrier")).is_ok());
                }
            });
        }
    });
}

/// The other tests of this program, on the instrumented builds.
#[test]
fn correct_kernels_raise_nothing_on_the_instrumented_builds() {
    let program = std::env::current_exe().expect("the test program has a path");
    let children = [("check", libraries::check(), None), ("asan", libraries::asan(), Some(libraries::preload()))];
    for (variant, library, preload) in children {
        let mut child = Command::new(&program);
        child.args(["layernorm::", "primitives::", "--test-threads=1"]).env(LIBRARY_VARIABLE, library);
        if let Some(preload) = preload {
            child.env("LD_PRELOAD", preload).env("ASAN_OPTIONS", "detect_leaks=0");
        }
        let done = child.output().expect("the test program runs");
        let printed = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success() && printed.contains("test result: ok"), "{variant}: {printed}");
        assert!(!printed.contains("running 0 tests"), "{variant}: {printed}");
    }
}
