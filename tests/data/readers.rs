//! Every input format, compression and way to name files gives the same documents.

use std::sync::Arc;

use retromae_engine::data::source::{Document, Format, expand, open};

use crate::support::{Dir, gz, zst};

fn document(id: &str, title: &str, text: &str) -> Document {
    let some = |s: &str| (!s.is_empty()).then(|| s.to_string());
    Document { id: some(id), title: some(title), text: text.into() }
}

/// Reads files by argument; gives the format of the first one and all documents.
fn read(args: &[String], format: Option<Format>, blank: bool) -> (Format, Vec<Document>) {
    let (mut first, mut all) = (None, Vec::new());
    for input in expand(args).unwrap_or_else(|e| panic!("{e}")) {
        let (found, documents) = open(&input, format, blank, Arc::default()).unwrap_or_else(|e| panic!("{e}"));
        first.get_or_insert(found);
        all.extend(documents.map(|d| d.unwrap_or_else(|e| panic!("{e}"))));
    }
    (first.expect("a file"), all)
}

#[track_caller]
fn check(name: &str, bytes: &[u8], format: Format, blank: bool, expected: &[Document]) {
    let dir = Dir::new();
    for (name, bytes) in
        [(name.to_string(), bytes.to_vec()), (format!("{name}.gz"), gz(bytes)), (format!("{name}.zst"), zst(bytes))]
    {
        dir.write(&name, bytes);
        assert_eq!(read(&[dir.arg(&name)], None, blank), (format, expected.to_vec()), "{name}");
    }
}

#[test]
fn text_is_a_document_a_line() {
    check("a.txt", b"one\ntwo words\n", Format::Text, false, &[document("", "", "one"), document("", "", "two words")]);
    // Without a line end, with CRLF, with a byte order mark.
    check("a.txt", b"\xEF\xBB\xBFone\r\ntwo", Format::Text, false, &[document("", "", "one"), document("", "", "two")]);
    // An empty line is an empty document: line numbers and documents stay in step.
    check(
        "a.txt",
        b"one\n\ntwo\n",
        Format::Text,
        false,
        &[document("", "", "one"), document("", "", ""), document("", "", "two")],
    );
}

#[test]
fn text_may_be_separated_by_blank_lines() {
    let bytes = b"\n\none\nmore\n \n\ntwo\r\n\r\n";
    check("a.txt", bytes, Format::Paragraphs, true, &[document("", "", "one\nmore"), document("", "", "two")]);
}

#[test]
fn json_knows_the_usual_names() {
    let lines = concat!(
        "{\"_id\": \"a\", \"title\": \"T\", \"text\": \"x\\ny\", \"metadata\": {\"text\": 1}}\n\n",
        "{\"id\": 7, \"contents\": \"z\"}\n",
        "{\"text\": \"only\"}\n",
        "{\"pid\": \"p\", \"docid\": \"d\", \"body\": \"b\", \"passage\": \"pp\", \"title\": null}\n",
        "{\"docid\": -1, \"document_text\": \"\\u00e9\", \"t\\u0065xt\": \"best\"}\n",
    );
    let expected = [
        document("a", "T", "x\ny"),
        document("7", "", "z"),
        document("", "", "only"),
        document("d", "", "pp"),
        document("-1", "", "best"),
    ];
    check("a.jsonl", lines.as_bytes(), Format::Jsonl, false, &expected);
    // No extension: the first byte tells.
    check("unnamed", lines.as_bytes(), Format::Jsonl, false, &expected);
}

#[test]
fn tsv_has_two_to_four_columns() {
    check("a.tsv", b"1\tx y\r\n2\t\n", Format::Tsv, false, &[document("1", "", "x y"), document("2", "", "")]);
    check("a.tsv", b"1\tT\tx\n2\t\ty\n", Format::Tsv, false, &[document("1", "T", "x"), document("2", "", "y")]);
    check("a.tsv", b"D1\thttp://x\tT\tx\n", Format::Tsv, false, &[document("D1", "T", "x")]);
    check("unnamed", b"1\tx\n", Format::Tsv, false, &[document("1", "", "x")]);
}

#[test]
fn folders_globs_and_beir() {
    let dir = Dir::new();
    dir.write("d/b.txt", "b\n");
    dir.write("d/a.txt.gz", gz(b"a\n"));
    dir.write("d/sub/c.jsonl", "{\"text\": \"c\"}\n");
    dir.write("d/.hidden.txt", "no\n");
    dir.write("d/notes.md", "no\n");
    let texts = |args: &[String]| read(args, None, false).1.into_iter().map(|d| d.text).collect::<Vec<_>>();
    assert_eq!(texts(&[dir.arg("d")]), ["a", "b", "c"]);
    assert_eq!(texts(&[dir.arg("d/*.txt*")]), ["a", "b"]);
    assert_eq!(texts(&[dir.arg("d/b.txt"), dir.arg("d/a.txt.gz")]), ["b", "a"]);
    dir.write("beir/corpus.jsonl", "{\"_id\": \"1\", \"title\": \"\", \"text\": \"passage\"}\n");
    dir.write("beir/queries.jsonl", "{\"_id\": \"q\", \"text\": \"query\"}\n");
    dir.write("beir/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\t1\t1\n");
    assert_eq!(texts(&[dir.arg("beir")]), ["passage"]);
    // A name with brackets that exists is a name.
    dir.write("x[1].txt", "brackets\n");
    assert_eq!(texts(&[dir.arg("x[1].txt")]), ["brackets"]);
    let message = expand(&[dir.arg("none*.txt")]).expect_err("no file").to_string();
    assert!(message.contains("no file matches"), "{message}");
}

#[test]
fn the_format_can_be_named() {
    let dir = Dir::new();
    dir.write("para.txt", "1\tx\n");
    assert_eq!(read(&[dir.arg("para.txt")], Some(Format::Tsv), false).1, [document("1", "", "x")]);
}

#[test]
fn standard_input_is_read() {
    let dir = Dir::new();
    dir.write("in", gz(b"{\"id\": 1, \"text\": \"hello world\"}\n"));
    let mut command = std::process::Command::new(crate::support::binary());
    let out = dir.arg("out");
    command.args(["tokenize", "--input", "-", "--output", &out, "--tokenizer"]).arg(crate::support::golden());
    command.stdin(std::fs::File::open(dir.at("in")).expect("a file"));
    let ran = crate::support::finish(&mut command).ok();
    assert!(ran.err.contains("-: JSON lines"), "{}", ran.err);
    assert_eq!(crate::support::sequences(&dir.open("out")), [(Some("1".into()), vec![101, 7592, 2088, 102])]);
}

#[cfg(feature = "parquet")]
mod parquet_files {
    use super::*;
    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType, DataType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};

    fn column<T: DataType>(group: &mut SerializedRowGroupWriter<'_, Vec<u8>>, values: &[T::T], levels: Option<&[i16]>) {
        let mut column = group.next_column().expect("a column").expect("one more column");
        column.typed::<T>().write_batch(values, levels, None).expect("values");
        column.close().expect("a column");
    }

    /// `rows` rows in groups of 700, every seventh title null.
    fn file(rows: usize, compression: Compression) -> Vec<u8> {
        let schema = "message m { required int64 id; optional group skip { optional int64 text; } \
                      optional binary title (UTF8); required binary text (UTF8); }";
        let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).expect("a schema"));
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).expect("a writer");
        let all: Vec<usize> = (0..rows).collect();
        for part in all.chunks(700) {
            let mut group = writer.next_row_group().expect("a group");
            column::<Int64Type>(&mut group, &part.iter().map(|&i| i as i64).collect::<Vec<_>>(), None);
            column::<Int64Type>(&mut group, &[], Some(&vec![0; part.len()]));
            let levels: Vec<i16> = part.iter().map(|i| i16::from(i % 7 != 0)).collect();
            let titles: Vec<ByteArray> =
                part.iter().filter(|&i| i % 7 != 0).map(|i| format!("title {i}").as_str().into()).collect();
            column::<ByteArrayType>(&mut group, &titles, Some(&levels));
            // Few distinct texts: stored through a dictionary.
            let texts: Vec<ByteArray> = part.iter().map(|i| format!("text {}", i % 3).as_str().into()).collect();
            column::<ByteArrayType>(&mut group, &texts, None);
            group.close().expect("a group");
        }
        writer.into_inner().expect("a file")
    }

    #[test]
    fn columns_are_found_and_nulls_kept() {
        let expected = |rows: usize| -> Vec<Document> {
            let title = |i| if i % 7 == 0 { String::new() } else { format!("title {i}") };
            (0..rows).map(|i| document(&i.to_string(), &title(i), &format!("text {}", i % 3))).collect()
        };
        for (rows, compression) in
            [(0, Compression::UNCOMPRESSED), (1, Compression::SNAPPY), (1500, Compression::ZSTD(Default::default()))]
        {
            let bytes = file(rows, compression);
            let dir = Dir::new();
            for (name, bytes) in [("a.parquet", bytes.clone()), ("a.parquet.gz", gz(&bytes)), ("unnamed", bytes)] {
                dir.write(name, bytes);
                assert_eq!(read(&[dir.arg(name)], None, false), (Format::Parquet, expected(rows)), "{name} {rows}");
            }
        }
    }

    #[test]
    fn damaged_files_are_refused() {
        let dir = Dir::new();
        let whole = file(40, Compression::SNAPPY);
        for cut in [4, 9, whole.len() / 2, whole.len() - 1] {
            dir.write("cut.parquet", &whole[..cut]);
            let message = dir.tokenize("cut.parquet", "out", &[]);
            let line = message.error(1);
            assert!(line.contains("cut.parquet: cannot be read as Parquet"), "{line}");
        }
    }
}
