//! Bad input: one clear line each, the exit code as contracted, nothing left behind.

use retromae_engine::files::{Lock, OutputDir, write_atomic};

use crate::support::{Dir, binary, finish, golden, run, sequences};

/// One input file, and what the error line must hold.
#[track_caller]
fn check(name: &str, bytes: &[u8], more: &[&str], expected: &[&str]) {
    let dir = Dir::new();
    dir.write(name, bytes);
    let ran = dir.tokenize(name, "out", more);
    let line = ran.error(1);
    assert!(expected.iter().all(|e| line.contains(e)), "{line}");
    assert_eq!(dir.names(), [name], "something was left behind");
}

#[test]
fn records_that_cannot_be_read() {
    check("a.jsonl", b"", &[], &["a.jsonl: no documents: the input is empty"]);
    check("a.jsonl", b"{\"text\": \" \"}\n", &[], &["none of the 1 documents holds any text"]);
    check("a.jsonl", b"{\"text\": \"x\"}\n{\"id\": 1, \"txt\": \"y\"}\n", &[], &["a.jsonl:2: no text", "there is txt"]);
    check(
        "a.jsonl",
        b"{\"text\": [\"x\"]}\n",
        &[],
        &["a.jsonl:1: field text: invalid type: sequence, expected a string"],
    );
    check("a.jsonl", b"{\"text\": \"x\"\n", &[], &["a.jsonl:1: EOF while parsing"]);
    check("a.jsonl", b"[{\"text\": \"x\"}]\n", &[], &["a.jsonl:1: ", "jq -c"]);
    check("a.jsonl", b"{\"id\": \"\", \"text\": \"x\"}\n", &[], &["a.jsonl:1: field id: the id is empty"]);
    check("a.txt", b"good\nb\xFFd\n", &[], &["a.txt:2: byte 2 of the line is not UTF-8", "iconv"]);
    check("a.txt", b"\xFF\xFEa\0", &[], &["a.txt: is UTF-16"]);
    check("a.tsv", b"1\tx\n2\ty\tz\n", &[], &["a.tsv:2: 3 tab-separated columns where the first line has 2"]);
    check("a.tsv", b"one\n", &[], &["a.tsv:1: 1 tab-separated column;"]);
    check("a.bin", b"\x7FELF\0\0\0", &[], &["a.bin: is neither text nor a known binary format"]);
    check("a.parquet", b"text, not parquet", &[], &["a.parquet: cannot be read as Parquet"]);
}

#[test]
fn several_bad_records_show_three_and_the_count() {
    let lines = "{}\n".repeat(7);
    check("a.jsonl", lines.as_bytes(), &[], &["a.jsonl:1: ", "a.jsonl:2: ", "a.jsonl:3: ", "7 errors in all"]);
}

#[test]
fn cut_and_damaged_compressed_files() {
    let text = (0..20_000).map(|i| format!("line {i}\n")).collect::<String>();
    let gz = crate::support::gz(text.as_bytes());
    check("a.txt.gz", &gz[..gz.len() / 2], &[], &["a.txt.gz: cannot read"]);
    let mut flipped = gz.clone();
    flipped[gz.len() / 2] ^= 0x10;
    check("a.txt.gz", &flipped, &[], &["a.txt.gz: cannot read"]);
    let zst = crate::support::zst(text.as_bytes());
    check("a.txt.zst", &zst[..zst.len() / 2], &[], &["a.txt.zst: cannot read"]);
}

#[test]
fn an_empty_file_among_others_is_only_told() {
    let dir = Dir::new();
    dir.write("in/a.txt", "");
    dir.write("in/b.txt", "hello\n");
    let ran = dir.tokenize("in", "out", &[]).ok();
    assert!(ran.err.contains("a.txt: no documents in it"), "{}", ran.err);
}

/// A line of 10 MB is a document like any other, within a gigabyte of address space.
#[test]
fn ten_megabyte_lines_fit() {
    let dir = Dir::new();
    for (name, unit) in [("words", "many words "), ("nospace", "x"), ("han", "漢"), ("accents", "é")] {
        let text = unit.repeat(10_000_000 / unit.len());
        dir.write(&format!("{name}.txt"), format!("{text}\nshort\n"));
        for packing in ["docs", "blocks"] {
            let out = format!("{name}-{packing}");
            let script = "ulimit -v 1048576; exec \"$@\"";
            let mut command = std::process::Command::new("bash");
            command.args(["-c", script, "sh", binary(), "tokenize", "--threads", "2", "--packing", packing]);
            command.arg("--input").arg(dir.at(&format!("{name}.txt"))).arg("--output").arg(dir.at(&out));
            command.arg("--tokenizer").arg(golden());
            finish(&mut command).ok();
            let set = dir.open(&out);
            assert_eq!(set.facts().counts.documents, 2);
            let last = set.len() - 1;
            assert_eq!(sequences(&set)[last as usize].1, [101, 2460, 102], "{name}");
            if (name, packing) == ("words", "blocks") {
                assert_eq!(set.tokens() - 2 * set.len() - 1, 2 * (10_000_000 / 11));
            }
        }
    }
}

#[test]
fn a_line_beyond_all_measure_is_refused() {
    check("a.txt", &vec![b'x'; (64 << 20) + 1], &[], &["a.txt:1: longer than 64 MiB"]);
}

#[test]
fn an_existing_output_is_kept() {
    let dir = Dir::new();
    dir.write("in.txt", "hello\n");
    dir.write("mine/precious.txt", "text");
    assert!(dir.tokenize("in.txt", "mine", &[]).error(1).contains("mine: the output folder already exists"));
    // Not even with --overwrite: this program did not write it.
    assert!(dir.tokenize("in.txt", "mine", &["--overwrite"]).error(1).contains("is not replaced"));
    assert!(dir.tokenize("in.txt", "in.txt", &[]).error(1).contains("exists and is not a folder"));
    assert_eq!(std::fs::read(dir.at("mine/precious.txt")).expect("a file"), b"text");
    dir.tokenize("in.txt", "out", &[]).ok();
    dir.write("in.txt", "hello hello\n");
    assert!(dir.tokenize("in.txt", "out", &[]).error(1).contains("add --overwrite"));
    assert_eq!(dir.open("out").tokens(), 3);
    dir.tokenize("in.txt", "out", &["--overwrite"]).ok();
    assert_eq!(dir.open("out").tokens(), 4);
    // A failed run leaves the old one in place.
    dir.write("in.txt", b"\xFF\n");
    dir.tokenize("in.txt", "out", &["--overwrite"]).error(1);
    assert_eq!(dir.open("out").tokens(), 4);
    assert_eq!(dir.names(), ["in.txt", "mine", "out"]);
}

#[test]
fn a_disk_without_room_is_one_line_and_leaves_nothing() {
    let dir = Dir::new();
    dir.write("in.txt", "some words that fill the shard\n".repeat(50_000));
    for blocks in [1, 300, 700, 1000] {
        // A limit on the size of a file stands in for a full disk: both fail a write in the middle.
        let script = format!("ulimit -f {blocks}; exec \"$@\"");
        let mut command = std::process::Command::new("bash");
        command.args(["-c", &script, "sh", binary(), "tokenize", "-q", "--input"]).arg(dir.at("in.txt"));
        command.arg("--output").arg(dir.at("out")).arg("--tokenizer").arg(golden());
        let ran = finish(&mut command);
        let line = ran.error(1);
        assert!(line.contains("cannot write: File too large"), "{line}");
        assert_eq!(dir.names(), ["in.txt"], "{blocks}");
    }
}

#[test]
fn a_full_file_system_is_one_line_and_the_same_command_succeeds_with_room() {
    let dir = Dir::new();
    dir.write("in.txt", "some words that fill the shard\n".repeat(50_000));
    std::fs::create_dir(dir.at("small")).expect("a folder");
    for kib in [64, 600, 1200] {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={kib}k"), "tmpfs"]).arg(dir.at("small"));
        if !mount.output().is_ok_and(|o| o.status.success()) {
            println!("left out: mounting a small tmpfs needs root; a size limit stands in for it");
            return;
        }
        let ran = dir.tokenize("in.txt", "small/out", &["-q"]);
        let left = std::fs::read_dir(dir.at("small")).map(Iterator::count);
        let unmounted = std::process::Command::new("umount").arg(dir.at("small")).status();
        assert!(unmounted.is_ok_and(|s| s.success()));
        let line = ran.error(1);
        assert!(line.contains("No space left on device; free space or choose another folder"), "{kib} KiB: {line}");
        assert_eq!(left.expect("a listing"), 0, "{kib} KiB");
    }
    dir.tokenize("in.txt", "small/out", &["-q"]).ok();
}

#[test]
fn one_writer_at_a_time_and_leftovers_go() {
    let dir = Dir::new();
    dir.write("in.txt", "hello\n");
    let held = OutputDir::create(&dir.at("out"), false, "meta.json").expect("a free name");
    let pid = format!("process {} is writing to this output folder", std::process::id());
    assert!(dir.tokenize("in.txt", "out", &[]).error(1).contains(&pid));
    drop(held);
    assert_eq!(dir.names(), ["in.txt"]);
    // What a killed run leaves is taken over by the next one.
    dir.write(".out.tmp/shard-00007.rms", "half a shard");
    dir.tokenize("in.txt", "out", &[]).ok();
    assert_eq!(dir.names(), ["in.txt", "out"]);
    assert!(!dir.at("out/shard-00007.rms").exists() && !dir.at("out/.lock").exists());
}

#[test]
fn locks_exclude_and_atomic_writes_are_whole() {
    let dir = Dir::new();
    let folder = dir.at("");
    let lock = Lock::acquire(&folder).expect("a free folder");
    assert!(Lock::acquire(&folder).expect_err("a held lock").to_string().contains("is writing to this output folder"));
    drop(lock);
    Lock::acquire(&folder).expect("a freed lock");
    let path = dir.write("file", "old");
    let failed =
        write_atomic(&path, |w| std::io::Write::write_all(w, b"half").and(Err(std::io::Error::other("no more"))));
    assert!(failed.expect_err("the failure is reported").to_string().contains("file: cannot write: no more"));
    assert_eq!(std::fs::read(&path).expect("a file"), b"old");
    write_atomic(&path, |w| std::io::Write::write_all(w, b"new")).expect("a write");
    assert_eq!(std::fs::read(&path).expect("a file"), b"new");
    assert_eq!(dir.names(), [".lock", "file"]);
}

#[test]
fn wrong_command_lines_are_one_line_and_code_two() {
    let none: [&str; 0] = [];
    assert_eq!(run(&none).code, Some(2));
    assert!(run(&["tokenize", "--nope"]).error(2).contains("unexpected argument '--nope'"));
    assert!(run(&["tokenize"]).error(2).contains("--output <DIR>"));
    assert!(run(&["tokenize", "--max-length", "2"]).error(2).contains("--max-length"));
    assert!(run(&["frobnicate"]).error(2).contains("frobnicate"));
    let dir = Dir::new();
    let (input, tokenizer) = (dir.arg("in.txt"), golden());
    let tokenizer = tokenizer.to_str().expect("UTF-8");
    let twice = ["tokenize", "--input", "-", "-", "--output", &input, "--tokenizer", tokenizer];
    assert!(run(&twice).error(2).contains("standard input is named twice"));
    assert_eq!(run(&["--help"]).ok().err, "");
    assert!(run(&["--version"]).ok().out.contains("retromae-engine"));
}
