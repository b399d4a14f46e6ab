//! The machine around a measurement: what one must know to believe it, before and after. What cannot be found out is null.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

/// What is asked of `nvidia-smi`: its names, and ours. The last is called otherwise by older drivers.
const ASKED: [(&str, &str); 11] = [
    ("name", "name"),
    ("driver_version", "driver"),
    ("clocks.sm", "sm_mhz"),
    ("clocks.mem", "memory_mhz"),
    ("clocks.max.sm", "sm_max_mhz"),
    ("clocks.max.mem", "memory_max_mhz"),
    ("power.draw", "power_w"),
    ("power.limit", "power_limit_w"),
    ("temperature.gpu", "temperature_c"),
    ("utilization.gpu", "busy_percent"),
    ("clocks_event_reasons.active", "throttle_reasons"),
];

/// Bits of the reasons why clocks are low, as the driver documents them, and whether they spoil a measurement.
const REASONS: [(u64, &str, bool); 9] = [
    (0x1, "idle", false),
    (0x2, "application clocks", false),
    (0x4, "software power cap", true),
    (0x8, "hardware slowdown", true),
    (0x10, "sync boost", false),
    (0x20, "software thermal slowdown", true),
    (0x40, "hardware thermal slowdown", true),
    (0x80, "hardware power brake", true),
    (0x100, "display clocks", false),
];

/// The GPU as `nvidia-smi` sees it; null without one.
pub fn gpu() -> Value {
    // The first of the visible ones is the one in use; the tool takes numbers and names alike.
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    let first = visible.split(',').next().map(str::trim).filter(|name| !name.is_empty()).unwrap_or("0");
    let ask = |reasons: &str| {
        let names = ASKED.map(|(theirs, ours)| if ours == "throttle_reasons" { reasons } else { theirs });
        let query = format!("--query-gpu={}", names.join(","));
        let output = Command::new("nvidia-smi").args(["-i", first, &query, "--format=csv,noheader,nounits"]).output();
        let output = output.ok().filter(|output| output.status.success())?;
        parse(&String::from_utf8_lossy(&output.stdout))
    };
    let found = ["clocks_event_reasons.active", "clocks_throttle_reasons.active"].into_iter().find_map(ask);
    found.map_or(Value::Null, Value::Object)
}

/// The first line of the answer.
fn parse(text: &str) -> Option<Map<String, Value>> {
    let cells: Vec<&str> = text.lines().next()?.split(',').map(str::trim).collect();
    if cells.len() != ASKED.len() {
        return None;
    }
    let value = |name: &str, cell: &str| match name {
        _ if cell.starts_with('[') || cell.eq_ignore_ascii_case("n/a") => Value::Null,
        "name" | "driver" => json!(cell),
        "throttle_reasons" => {
            let bits = cell.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
            bits.map_or(Value::Null, |bits| {
                REASONS.iter().filter(|reason| bits & reason.0 != 0).map(|reason| json!(reason.1)).collect()
            })
        }
        _ => cell.parse::<f64>().map_or(Value::Null, |number| json!(number)),
    };
    Some(ASKED.iter().zip(cells).map(|((_, ours), cell)| (ours.to_string(), value(ours, cell))).collect())
}

/// The processor: load, clocks, and who sets them.
pub fn processor() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let load: Option<Vec<f64>> = read("/proc/loadavg")
        .map(|text| text.split_whitespace().take(3).filter_map(|number| number.parse().ok()).collect());
    let info = read("/proc/cpuinfo").unwrap_or_default();
    let clocks: Vec<f64> = info
        .lines()
        .filter(|line| line.starts_with("cpu MHz"))
        .filter_map(|line| line.split_once(':')?.1.trim().parse().ok())
        .collect();
    let mean = (!clocks.is_empty()).then(|| clocks.iter().sum::<f64>() / clocks.len() as f64);
    let governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").map(|name| name.trim().to_string());
    json!({
        "load_average": load, "mhz": mean, "governor": governor,
        "cores": num_cpus::get_physical(), "logical_cores": num_cpus::get(),
    })
}

/// The commit of the engine, and whether its files were changed since: as `RETROMAE_COMMIT` says, else of the checkout that the program
/// lies in.
pub fn commit() -> (Option<String>, Option<bool>) {
    if let Ok(told) = std::env::var("RETROMAE_COMMIT") {
        let dirty = told.contains("uncommitted");
        return (Some(told), Some(dirty));
    }
    let program = std::env::current_exe().ok();
    let Some(folder) = program.as_deref().and_then(Path::parent) else { return (None, None) };
    let git = |args: &[&str]| {
        let output = Command::new("git").arg("-C").arg(folder).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    let changed = || git(&["status", "--porcelain", "--untracked-files=no", ":/"]).map(|changes| !changes.is_empty());
    git(&["rev-parse", "HEAD"]).map_or((None, None), |commit| (Some(commit), changed()))
}

/// Looks at the machine at the beginning and after every case.
pub struct Watch {
    with_gpu: bool,
    before: Value,
    /// The last look, and what has been said.
    last: Mutex<(Instant, Value, Vec<String>)>,
}

impl Watch {
    /// From now on.
    pub fn new(with_gpu: bool) -> Self {
        let before = look(with_gpu);
        Watch { with_gpu, before: before.clone(), last: Mutex::new((Instant::now(), before, Vec::new())) }
    }

    /// The machine before and now, and what has to be said of it that was not said before. Cases that follow each other within two
    /// seconds share a look.
    pub fn environment(&self) -> (Value, Vec<String>) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0.elapsed() > Duration::from_secs(2) {
            (last.0, last.1) = (Instant::now(), look(self.with_gpu));
        }
        let new: Vec<String> =
            warnings(&self.before, &last.1).into_iter().filter(|warning| !last.2.contains(warning)).collect();
        last.2.extend(new.iter().cloned());
        (json!({ "before": self.before, "after": last.1 }), new)
    }
}

fn look(with_gpu: bool) -> Value {
    json!({ "processor": processor(), "gpu": if with_gpu { gpu() } else { Value::Null } })
}

/// What makes a measurement doubtful.
fn warnings(before: &Value, after: &Value) -> Vec<String> {
    let mut said = Vec::new();
    let processor = &before["processor"];
    let (load, cores) = (processor["load_average"][0].as_f64(), processor["logical_cores"].as_f64());
    if let (Some(load), Some(cores)) = (load, cores)
        && load > 0.5 * cores
    {
        said.push(format!("warning: the load average was {load:.1} on {cores} processors before: others were at work"));
    }
    let clock = |state: &Value| state["gpu"]["sm_mhz"].as_f64();
    if let (Some(first), Some(now)) = (clock(before), clock(after))
        && now < 0.95 * first
    {
        said.push(format!("warning: the GPU's clock fell from {first:.0} to {now:.0} MHz"));
    }
    let reasons = |state: &Value| state["gpu"]["throttle_reasons"].as_array().cloned().unwrap_or_default();
    let spoils = |reason: &Value| REASONS.iter().any(|(_, name, spoils)| *spoils && reason == name);
    let bad: Vec<Value> = reasons(after).into_iter().filter(spoils).collect();
    if !bad.is_empty() {
        let names: Vec<&str> = bad.iter().filter_map(Value::as_str).collect();
        said.push(format!("warning: the GPU's clocks are held down: {}", names.join(", ")));
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "NVIDIA H200, 570.86.15, 1980, 3201, 1980, 3201, 118.36, 700.00, 41, 7, 0x0000000000000001\n";

    #[test]
    fn an_answer_of_nvidia_smi() {
        let gpu = Value::Object(parse(LINE).unwrap());
        assert_eq!((&gpu["name"], &gpu["driver"]), (&json!("NVIDIA H200"), &json!("570.86.15")));
        assert_eq!((&gpu["sm_mhz"], &gpu["power_limit_w"]), (&json!(1980.0), &json!(700.0)));
        assert_eq!(gpu["throttle_reasons"], json!(["idle"]));
        let unknown = parse(&LINE.replace("118.36", "[N/A]").replace("0x0000000000000001", "[Not Supported]")).unwrap();
        assert!(unknown["power_w"].is_null() && unknown["throttle_reasons"].is_null());
        assert!(parse("No devices were found\n").is_none() && parse("").is_none());
    }

    #[test]
    fn doubtful_measurements_are_called_so() {
        let state = |load: f64, line: &str| json!({ "processor": { "load_average": [load], "logical_cores": 4 }, "gpu": parse(line) });
        let calm = state(0.3, LINE);
        assert!(warnings(&calm, &calm).is_empty());
        assert_eq!(warnings(&state(2.5, LINE), &calm).len(), 1);
        let hot = state(0.3, &LINE.replacen("1980", "1410", 1).replace("0001\n", "0060\n"));
        let said = warnings(&calm, &hot);
        assert_eq!(said[0], "warning: the GPU's clock fell from 1980 to 1410 MHz");
        assert_eq!(
            said[1],
            "warning: the GPU's clocks are held down: software thermal slowdown, hardware thermal slowdown"
        );
        let without = json!({ "processor": { "load_average": null, "logical_cores": 4 }, "gpu": null });
        assert!(warnings(&without, &without).is_empty());
    }

    #[test]
    fn this_machine_has_processors() {
        let (told, warned) = Watch::new(false).environment();
        assert!(told["before"]["processor"]["logical_cores"].as_u64().unwrap() > 0 && told["after"]["gpu"].is_null());
        assert!(warned.len() <= 1, "{warned:?}");
    }
}
