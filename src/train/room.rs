//! Whether a run fits into memory, before anything is allocated, and if not, which settings would.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::train::progress::bytes;

/// Memory of the machine or of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Whose, in words.
    pub of: String,
    /// Bytes in all.
    pub all: u64,
    /// Bytes that nobody uses now, where that is known.
    pub free: Option<u64>,
}

impl Memory {
    /// That of a device; none where the system does not tell.
    pub fn of(device: Device) -> Option<Memory> {
        match device {
            Device::Cpu => Memory::of_machine(),
            Device::Gpu(gpu) => Some(Memory { of: gpu.facts().name.clone(), all: gpu.facts().memory, free: None }),
        }
    }

    /// That of this machine with its swap, or what a container may use of it.
    pub fn of_machine() -> Option<Memory> {
        let info = std::fs::read_to_string("/proc/meminfo").ok()?;
        let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
        // "max" where there is no limit.
        let limit = limits.iter().find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok());
        Memory::parse(&info, limit.unwrap_or(u64::MAX))
    }

    fn parse(info: &str, limit: u64) -> Option<Memory> {
        let read = |key: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
        };
        let swap = |key| read(key).unwrap_or(0);
        let all = (read("MemTotal")? + swap("SwapTotal")).min(limit);
        let free = (read("MemAvailable")? + swap("SwapFree")).min(all);
        Some(Memory { of: "this machine".into(), all, free: Some(free) })
    }
}

/// A setting that makes a run take less memory.
pub struct Knob<'a> {
    /// Its flag.
    pub flag: &'static str,
    /// Its value now, the largest of interest.
    pub now: u64,
    /// Its smallest value.
    pub least: u64,
    /// Bytes that the run takes with another value.
    pub bytes: Box<dyn Fn(u64) -> u64 + 'a>,
    /// What else is to be given with this value for steps of as many texts, after a blank.
    pub with: Box<dyn Fn(u64) -> String + 'a>,
}

impl<'a> Knob<'a> {
    /// One whose value is all that changes.
    pub fn new(flag: &'static str, (now, least): (u64, u64), bytes: impl Fn(u64) -> u64 + 'a) -> Self {
        Knob { flag, now, least, bytes: Box::new(bytes), with: Box::new(|_| String::new()) }
    }

    /// A smaller micro-batch, of which as many more make a step.
    pub fn batch(flag: &'static str, now: u64, accumulate: u32, bytes: impl Fn(u64) -> u64 + 'a) -> Self {
        let with = move |n: u64| format!(" --accumulate {}", now.div_ceil(n.max(1)) * u64::from(accumulate));
        Knob { with: Box::new(with), ..Knob::new(flag, (now, 1), bytes) }
    }

    /// The largest value below the present one with which the run takes at most `room` bytes; of large values a multiple of 8.
    fn fitting(&self, room: u64) -> Option<u64> {
        if self.now <= self.least || (self.bytes)(self.least) > room {
            return None;
        }
        let (mut fits, mut not) = (self.least, self.now);
        while not - fits > 1 {
            let middle = fits + (not - fits) / 2;
            if (self.bytes)(middle) <= room { fits = middle } else { not = middle }
        }
        Some(if fits / 8 * 8 > self.least.max(8) { fits / 8 * 8 } else { fits })
    }
}

/// Refuses a run that needs more than there is, and says which flags would make it fit. A run that fits only if others give memory
/// back is a line worth telling.
///
/// # Errors
/// The run needs more memory than there is.
pub fn check(needed: u64, memory: &Memory, knobs: &[Knob]) -> Result<Option<String>> {
    let free = memory.free.unwrap_or(memory.all);
    if needed <= free {
        return Ok(None);
    }
    // What the system and libraries take beside the run.
    let room = free - free / 16;
    let flags: Vec<String> = knobs
        .iter()
        .filter_map(|knob| {
            let value = knob.fitting(room)?;
            Some(format!("{} {value}{} ({})", knob.flag, (knob.with)(value), bytes((knob.bytes)(value))))
        })
        .collect();
    let remedy = match flags[..] {
        [] => "no smaller batch fits: choose a smaller model, or a device with more memory".to_string(),
        _ => format!("what fits: {}", flags.join(", or ")),
    };
    let there = match memory.free {
        Some(free) => format!("{} has {}, {} of them free", memory.of, bytes(memory.all), bytes(free)),
        None => format!("{} has {}", memory.of, bytes(memory.all)),
    };
    let cause = format!("out of memory: the run needs {}, {there}", bytes(needed));
    match needed > memory.all {
        true => Err(Error::device(cause).remedy(remedy)),
        false => Ok(Some(format!("{cause}; {remedy}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn swap_counts_and_a_container_may_use_less() {
        let info =
            "MemTotal:       2048 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\nSwapTotal: 512 kB\nSwapFree: 256 kB\n";
        let all = Memory::parse(info, u64::MAX).unwrap();
        assert_eq!((all.all, all.free), (2560 << 10, Some(1280 << 10)));
        let part = Memory::parse(info, 1 << 20).unwrap();
        assert_eq!((part.all, part.free), (1 << 20, Some(1 << 20)));
        assert_eq!(Memory::parse("MemTotal: 1 kB\n", 1), None);
    }

    #[test]
    fn the_largest_value_that_fits_is_named() {
        let memory = Memory { of: "it".into(), all: 16 * GIB, free: None };
        let knobs = || {
            [
                Knob::batch("--batch-size", 64, 2, |n| GIB + n * GIB),
                Knob::new("--max-length", (512, 3), |n| n * GIB / 4),
            ]
        };
        assert_eq!(check(16 * GIB, &memory, &knobs()).unwrap(), None);
        let told = check(65 * GIB, &memory, &knobs()).unwrap_err().to_string();
        let expected = "out of memory: the run needs 65.00 GiB, it has 16.00 GiB; what fits: --batch-size 14 --accumulate 10 \
                        (15.00 GiB), or --max-length 56 (14.00 GiB)";
        assert_eq!(told, expected);
        let busy = Memory { free: Some(GIB), ..memory };
        let told = check(2 * GIB, &busy, &knobs()).unwrap().unwrap();
        assert!(told.contains("it has 16.00 GiB, 1.00 GiB of them free; what fits: --max-length 3 ("), "{told}");
        let none = check(65 * GIB, &busy, &knobs()[..1]).unwrap_err().to_string();
        assert!(
            none.ends_with("; no smaller batch fits: choose a smaller model, or a device with more memory"),
            "{none}"
        );
    }
}
