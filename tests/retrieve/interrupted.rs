//! Killed or starved of disk at any moment, encode goes on to the very folder of an undisturbed run.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use retromae_engine::files::Disk;
use retromae_engine::retrieve::embeddings::{Layout, Meta};
use retromae_engine::retrieve::model::Texts;
use retromae_engine::retrieve::representation::Representation;

use crate::support::{Dir, content, counting, encode_on, jsonl, open, passages, texts};

fn job(layout: Layout) -> Texts {
    // What Pyserini reads is made of lexical embeddings.
    let representation = if layout == Layout::Pyserini { Representation::Both } else { Representation::Cls };
    Texts { layout, representation, lexical_top_k: 7, ..passages(4) }
}

fn model_for(dir: &Dir, layout: Layout) -> PathBuf {
    if layout == Layout::Pyserini { dir.headed("model", 1) } else { dir.model("model", 1) }
}

/// The test binary doubles as the program that is killed.
#[test]
fn child() {
    let (Ok(folder), Ok(at)) = (std::env::var("RETROMAE_ENCODE_IN"), std::env::var("RETROMAE_ENCODE_KILL_AT")) else {
        let dir = Dir::new();
        let model = open(&dir.model("model", 1));
        let input = dir.write("all.jsonl", jsonl(&texts(10)));
        assert_eq!(encode_on(&Disk::default(), &model, &input, &dir.at("out"), &job(Layout::Npy)).unwrap().rows, 10);
        return;
    };
    let (folder, at): (&Path, usize) = (Path::new(&folder), at.parse().unwrap());
    let disk = counting(move |number| {
        if number == at {
            let _ = Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
            std::thread::sleep(std::time::Duration::from_secs(60));
        }
        Ok(())
    });
    let layout = match std::env::var("RETROMAE_ENCODE_LAYOUT").as_deref() {
        Ok("faiss") => Layout::FaissFlat,
        Ok("pyserini") => Layout::Pyserini,
        _ => Layout::Npy,
    };
    encode_on(&disk, &open(&folder.join("model")), &folder.join("all.jsonl"), &folder.join("out"), &job(layout))
        .unwrap();
}

#[test]
fn killed_at_any_file_operation_it_goes_on_to_the_same_folder() {
    for (layout, name) in [(Layout::Npy, "npy"), (Layout::FaissFlat, "faiss"), (Layout::Pyserini, "pyserini")] {
        let dir = Dir::new();
        let model = open(&model_for(&dir, layout));
        let input = dir.write("all.jsonl", jsonl(&texts(10)));
        encode_on(&Disk::default(), &model, &input, &dir.at("undisturbed"), &job(layout)).unwrap();
        let expected = content(&dir.at("undisturbed"));
        let (mut at, mut killed, mut resumed) = (0, 0, 0);
        loop {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "interrupted::child", "--nocapture"]).stdout(Stdio::null()).stderr(Stdio::null());
            command.env("RETROMAE_ENCODE_IN", dir.at(".")).env("RETROMAE_ENCODE_KILL_AT", at.to_string());
            command.env("RETROMAE_ENCODE_LAYOUT", name);
            let status = command.status().unwrap();
            let done = encode_on(&Disk::default(), &model, &input, &dir.at("out"), &job(layout)).unwrap();
            assert_eq!(content(&dir.at("out")), expected, "{layout:?}, killed at operation {at}");
            resumed += usize::from(done.resumed > 0);
            if status.success() {
                break;
            }
            killed += 1;
            std::fs::remove_dir_all(dir.at("out")).unwrap();
            // Every third operation: they are many and alike.
            at += 3;
        }
        assert!(killed > 10 && resumed > 5, "{killed} kills, {resumed} resumed");
    }
}

#[test]
fn a_full_disk_is_one_error_and_a_second_run_completes_the_folder() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let input = dir.write("all.jsonl", jsonl(&texts(10)));
    encode_on(&Disk::default(), &model, &input, &dir.at("undisturbed"), &job(Layout::Npy)).unwrap();
    let expected = content(&dir.at("undisturbed"));
    let mut at = 0;
    loop {
        let disk = counting(move |number| if number == at { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) });
        let first = encode_on(&disk, &model, &input, &dir.at("out"), &job(Layout::Npy));
        if let Err(e) = &first {
            assert!(e.to_string().ends_with("; free space or choose another folder"), "{e}");
            if !dir.at("out/meta.json").exists() && dir.at("out").exists() {
                assert!(Meta::read(&dir.at("out")).is_err());
            }
        }
        encode_on(&Disk::default(), &model, &input, &dir.at("out"), &job(Layout::Npy)).unwrap();
        assert_eq!(content(&dir.at("out")), expected, "failed at operation {at}");
        if first.is_ok() {
            break;
        }
        std::fs::remove_dir_all(dir.at("out")).unwrap();
        at += 1;
    }
    assert!(at > 20, "{at} operations");
}

#[test]
fn a_complete_folder_is_left_as_it_is_and_another_input_is_refused() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let all = texts(10);
    let input = dir.write("all.jsonl", jsonl(&all));
    let encode = |input: &Path, texts: &Texts| encode_on(&Disk::default(), &model, input, &dir.at("out"), texts);
    encode(&input, &job(Layout::Npy)).unwrap();
    let expected = content(&dir.at("out"));
    let again = encode(&input, &job(Layout::Npy)).unwrap();
    assert_eq!((again.rows, again.resumed, again.tokens), (10, 10, 0));
    assert_eq!(content(&dir.at("out")), expected);
    let other = dir.write("other.jsonl", jsonl(&all[..9]));
    let message = dir.message(encode(&other, &job(Layout::Npy)));
    assert_eq!(message, "out: holds the embeddings of another input; choose another --output or add --overwrite");
    let shorter = Texts { max_length: Some(16), ..job(Layout::Npy) };
    let message = dir.message(encode(&input, &shorter));
    assert!(message.starts_with("out: holds embeddings with max_len 48; now it is 16; "), "{message}");
    encode(&other, &Texts { overwrite: true, ..shorter }).unwrap();
    assert_eq!(Meta::read(&dir.at("out")).unwrap().count, 9);
}

#[test]
fn an_input_that_changed_meanwhile_is_refused() {
    let dir = Dir::new();
    let model = open(&dir.model("model", 1));
    let all = texts(10);
    let input = dir.write("all.jsonl", jsonl(&all));
    let bad = dir.write("bad.jsonl", format!("{}not JSON\n", jsonl(&all)));
    let encode = |input: &Path, texts: &Texts| encode_on(&Disk::default(), &model, input, &dir.at("out"), texts);
    // The bad line comes after two complete files.
    let message = dir.message(encode(&bad, &job(Layout::Npy)));
    assert!(message.starts_with("bad.jsonl:11: "), "{message}");
    let mut changed = all.clone();
    changed[2] = "another text".into();
    let other = dir.write("other.jsonl", jsonl(&changed));
    let message = dir.message(encode(&other, &job(Layout::Npy)));
    assert!(message.starts_with("out: the input has changed since these embeddings were begun; "), "{message}");
    let message = dir.message(encode(&input, &Texts { max_length: Some(16), ..job(Layout::Npy) }));
    assert!(message.starts_with("out: was begun with max_len 48; now it is 16; "), "{message}");
    let done = encode(&input, &job(Layout::Npy)).unwrap();
    assert_eq!((done.rows, done.resumed), (10, 8));
}
