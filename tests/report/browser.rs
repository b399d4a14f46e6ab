//! The page in a browser, where there is one: nothing is wider than the window, on a phone neither, and dark is dark.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{page, resumed};
use crate::world::World;

/// A Chromium that starts.
fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("RETROMAE_CHROMIUM").map(PathBuf::from);
    let usual = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"].map(PathBuf::from);
    let starts = |path: &PathBuf| Command::new(path).arg("--version").output().is_ok_and(|done| done.status.success());
    named.into_iter().chain(usual).find(starts)
}

/// The browser without a window, and with a profile of its own.
fn headless(browser: &Path, profile: &Path) -> Command {
    let mut command = Command::new(browser);
    command.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]);
    command.arg(format!("--user-data-dir={}", profile.display()));
    command
}

/// Frames of these widths around the page, and a script beside it that says how wide its content came out.
fn framed(page: &str, widths: &[u32]) -> String {
    let page = page.replace('&', "&amp;").replace('"', "&quot;");
    let frames: String = widths
        .iter()
        .map(|w| format!("<iframe width=\"{w}\" height=\"3000\" style=\"border:0\" srcdoc=\"{page}\"></iframe>"))
        .collect();
    let measured = "f.contentDocument.documentElement.scrollWidth + '/' + f.width";
    format!(
        "<!DOCTYPE html><meta charset=\"utf-8\"><body style=\"margin:0\">{frames}<p id=\"widths\"></p><script>onload = () => {{ \
         widths.textContent = [...document.querySelectorAll('iframe')].map(f => {measured}).join(' ') }}</script>"
    )
}

#[test]
fn nothing_is_wider_than_the_window() {
    let Some(browser) = browser() else {
        println!("left out: no Chromium here, so the page is not looked at (Debian: apt install chromium)");
        return;
    };
    let world = World::new();
    let runs =
        [resumed(&world, "first", &[]), resumed(&world, "second-of-a-name-that-is-long-enough-to-be-in-the-way", &[])];
    let page = page(&[&runs[0], &runs[1]], &[]);
    let (file, profile) = (world.path("framed.html"), world.path("profile"));
    std::fs::write(&file, framed(&page, &[1280, 768, 390, 320])).unwrap();
    let url = format!("file://{}", file.display());
    let done = headless(&browser, &profile).args(["--virtual-time-budget=5000", "--dump-dom", &url]).output().unwrap();
    let dom = String::from_utf8_lossy(&done.stdout).into_owned();
    let told = dom.split("id=\"widths\">").nth(1).and_then(|rest| rest.split('<').next()).unwrap_or_default();
    let widths: Vec<(&str, &str)> = told.split(' ').filter_map(|pair| pair.split_once('/')).collect();
    assert_eq!(widths.len(), 4, "{told}: {}", String::from_utf8_lossy(&done.stderr));
    assert!(widths.iter().all(|(content, window)| content == window), "content/window: {told}");

    // Kept where RETROMAE_SCREENSHOTS names a folder, to be looked at.
    let kept = std::env::var_os("RETROMAE_SCREENSHOTS").map(PathBuf::from);
    let folder = kept.unwrap_or_else(|| world.path("screenshots"));
    std::fs::create_dir_all(&folder).unwrap();
    for width in [1280, 390] {
        std::fs::write(&file, framed(&page, &[width])).unwrap();
        let shots = [("light", "1"), ("dark", "0")].map(|(name, scheme)| {
            let shot = folder.join(format!("report-{width}-{name}.png"));
            let mut command = headless(&browser, &profile);
            command
                .arg(format!("--blink-settings=preferredColorScheme={scheme}"))
                .arg(format!("--screenshot={}", shot.display()));
            command.arg(format!("--window-size={},3000", width.max(500))).arg(&url).output().unwrap();
            std::fs::read(shot).unwrap()
        });
        assert!(shots.iter().all(|png| png.starts_with(b"\x89PNG") && png.len() > 10_000));
        assert!(shots[0] != shots[1], "dark mode looks as light mode does");
    }
}
