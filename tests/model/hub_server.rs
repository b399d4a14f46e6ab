//! Models fetched by name, from a server that behaves as the hub does, and as it should not.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use crate::golden;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a server does beside serving.
#[derive(Default)]
struct Conduct {
    /// Ends the first answer with weights after this many bytes.
    cut: Option<usize>,
    /// Serves other weights than its digest says.
    lies: bool,
    /// Status of every answer.
    refuses: Option<&'static str>,
}

struct Server {
    endpoint: String,
    /// Path and range of every request.
    requests: Arc<Mutex<Vec<(String, String)>>>,
}

impl Server {
    fn start(conduct: Conduct) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::<Mutex<Vec<(String, String)>>>::default();
        let (log, conduct) = (requests.clone(), Arc::new(Mutex::new(conduct)));
        let files: BTreeMap<String, Vec<u8>> = std::fs::read_dir(golden("head32/retromae/model"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap()))
            .collect();
        let files = Arc::new(files);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, conduct, files) = (log.clone(), conduct.clone(), files.clone());
                std::thread::spawn(move || serve(&stream, &files, &log, &conduct));
            }
        });
        Server { endpoint, requests }
    }

    fn step(&self, model: &str, home: &Path, output: &Path) -> Output {
        step(&self.endpoint, model, home, output, &[])
    }
}

/// Answers the requests of a connection, one after another.
fn serve(
    stream: &TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    log: &Mutex<Vec<(String, String)>>,
    conduct: &Mutex<Conduct>,
) -> Option<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut request, mut range) = (String::new(), String::new());
        reader.read_line(&mut request).ok().filter(|n| *n > 0)?;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok().filter(|n| *n > 0)?;
            if header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.to_lowercase().strip_prefix("range:") {
                range = value.trim().to_string();
            }
        }
        let path = request.split(' ').nth(1)?.to_string();
        log.lock().unwrap().push((path.clone(), range.clone()));
        let mut conduct = conduct.lock().unwrap();
        let mut out = stream;
        let mut status = |status: &str| write!(out, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").ok();
        if let Some(code) = conduct.refuses {
            status(code)?;
            continue;
        }
        let names = files.keys().map(|name| serde_json::json!({"rfilename": name})).collect::<Vec<_>>();
        let info = serde_json::json!({"sha": COMMIT, "siblings": names}).to_string();
        let file = path.strip_prefix("/org/tiny/resolve/main/").and_then(|name| files.get_key_value(name));
        if path == "/api/models/org/tiny/revision/main" {
            write!(out, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{info}", info.len()).ok()?;
        } else if let Some((name, bytes)) = file {
            let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            let first: usize = first.parse().ok()?;
            let last = last.parse().map_or(bytes.len() - 1, |last: usize| last.min(bytes.len() - 1));
            let weights = name.ends_with(".safetensors");
            let digest: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
            let etag = if weights { digest } else { digest[..40].to_string() };
            let mut body = bytes[first..=last].to_vec();
            if weights && conduct.lies {
                body[0] ^= 1;
            }
            write!(
                out,
                "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{}\r\nETag: \"{etag}\"\r\n\
                 X-Repo-Commit: {COMMIT}\r\n\r\n",
                body.len(),
                bytes.len()
            )
            .ok()?;
            if let Some(cut) = conduct.cut.take_if(|cut| name == "model.safetensors" && body.len() > *cut) {
                out.write_all(&body[..cut]).ok()?;
                return stream.shutdown(std::net::Shutdown::Both).ok();
            }
            out.write_all(&body).ok()?;
        } else {
            status("404 Not Found")?;
        }
    }
}

fn step(endpoint: &str, model: &str, home: &Path, output: &Path, variables: &[(&str, &str)]) -> Output {
    let batch = golden("head32/retromae/batch.safetensors");
    let mut command = Command::new(env!("CARGO_BIN_EXE_retromae-engine"));
    command.args(["step", "--device", "cpu", "--objective", "retromae", "--model", model, "--batch"]).arg(batch);
    command.arg("--output").arg(output).env("HF_ENDPOINT", endpoint).env("HF_HOME", home).env_remove("HF_HUB_CACHE");
    for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"] {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn refused(output: &Output, parts: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{text}");
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
}

#[test]
fn a_model_is_fetched_by_name_resumed_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (home, at) = (folder.path().join("hf"), |name: &str| folder.path().join(name));
    let server = Server::start(Conduct { cut: Some(1000), ..Conduct::default() });
    let cut = server.step("org/tiny", &home, &at("cut"));
    refused(&cut, &["org/tiny, model.safetensors, revision main", "it goes on where it stopped"]);
    let done = server.step("org/tiny", &home, &at("done"));
    assert!(done.status.success(), "{}", stderr(&done));
    let requests = server.requests.lock().unwrap().clone();
    assert!(requests.iter().any(|(path, range)| path.ends_with("/model.safetensors") && range == "bytes=1000-"));
    let last = requests.iter().rfind(|(_, range)| !range.is_empty()).unwrap();
    assert!(last.0.ends_with("/config.json"), "the mark of a complete snapshot comes last: {last:?}");

    let local = golden("head32/retromae/model");
    let local = step(&server.endpoint, local.to_str().unwrap(), &home, &at("local"), &[]);
    assert!(local.status.success(), "{}", stderr(&local));
    assert_eq!(std::fs::read(at("done")).unwrap(), std::fs::read(at("local")).unwrap());

    // Once more without a network: nothing is asked, not even for news.
    let asked = server.requests.lock().unwrap().len();
    let again = step("http://127.0.0.1:9", "org/tiny", &home, &at("again"), &[("HF_HUB_OFFLINE", "1")]);
    assert!(again.status.success(), "{}", stderr(&again));
    assert!(server.step("org/tiny", &home, &at("once-more")).status.success());
    assert_eq!(server.requests.lock().unwrap().len(), asked);
}

#[test]
fn what_cannot_be_fetched_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let (home, out) = (folder.path().join("hf"), folder.path().join("out"));
    let server = Server::start(Conduct::default());
    refused(
        &server.step("org/other", &home, &out),
        &["org/other, revision main: ", "no such model or revision; check the name"],
    );
    refused(&server.step("org/tiny@v9", &home, &out), &["org/tiny, revision v9: "]);
    let offline = step(&server.endpoint, "org/tiny", &home, &out, &[("HF_HUB_OFFLINE", "1")]);
    refused(&offline, &["is not in the local cache", "unset HF_HUB_OFFLINE to fetch it now"]);
    let nobody = step("http://127.0.0.1:9", "org/tiny", &home, &out, &[]);
    refused(&nobody, &["fetching it from http://127.0.0.1:9", "set HF_ENDPOINT to a mirror, or give a folder"]);
    let gated = Server::start(Conduct { refuses: Some("401 Unauthorized"), ..Conduct::default() });
    refused(&gated.step("org/tiny", &home, &out), &["known users only", "set HF_TOKEN"]);
    let ill = Server::start(Conduct { refuses: Some("503 Service Unavailable"), ..Conduct::default() });
    refused(&ill.step("org/tiny", &home, &out), &["answered with status 503"]);
    assert!(!out.exists());
}

#[test]
fn weights_that_are_not_the_hubs_are_removed() {
    let folder = tempfile::tempdir().unwrap();
    let (home, out) = (folder.path().join("hf"), folder.path().join("out"));
    let liar = Server::start(Conduct { lies: true, ..Conduct::default() });
    refused(
        &liar.step("org/tiny", &home, &out),
        &["did not arrive as the hub has it, and is removed; run the command again"],
    );
    let honest = Server::start(Conduct::default());
    let done = honest.step("org/tiny", &home, &out);
    assert!(done.status.success(), "{}", stderr(&done));
}
