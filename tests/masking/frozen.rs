//! The random stream, frozen: a change of these values changes every run, breaks the resuming of old ones and must be deliberate.

use retromae_engine::data::masking::Masker;
use retromae_engine::data::order::{Order, Part};

use super::common::*;

#[test]
fn order() {
    let order = Order::new(42, 10, 3).unwrap();
    let held_out: Vec<u64> = (0..3).map(|i| order.text(Part::HeldOut, i)).collect();
    let train: Vec<u64> = (0..14).map(|i| order.text(Part::Train, i)).collect();
    assert_eq!(held_out, [0, 2, 9]);
    assert_eq!(train, [8, 7, 1, 6, 5, 4, 3, 6, 3, 7, 8, 5, 1, 4]);
}

#[test]
fn masks_of_a_tiny_text() {
    let (ids, starts) = text_of_words(&[1, 2, 1, 3, 1, 2]);
    let masks = mask(&mut Masker::new(&rules(42)), &ids, &starts, 5_000_000_007);
    let rows: Vec<u32> = masks
        .hidden
        .iter()
        .map(|row| row.iter().enumerate().fold(0, |bits, (j, &h)| bits | u32::from(h) << j))
        .collect();
    assert_eq!(masks.labels, [1, 4, 9, 10]);
    assert_eq!(masks.encoder_ids, [101, 103, 201, 202, 103, 204, 205, 206, 207, 103, 103, 102]);
    assert_eq!(rows, [1810, 286, 1566, 1566, 1762, 1762, 498, 498, 498, 1566, 1820, 252]);
    assert_eq!(masks.row, [7, 2, 3, 5, 1, 10, 3, 7, 1, 7, 2, 7]);
}

#[test]
fn a_whole_batch_by_its_digest() {
    let corpus = corpus([512, 40, 2, 1100, 257]);
    let batch = build(&corpus, 42, 0..10);
    let decoder = batch.decoder.unwrap();
    let bytes = [batch.encoder_ids, batch.encoder_label_rows, decoder.label_rows, decoder.visibility.words].concat();
    let bytes: Vec<u8> = bytes.iter().flat_map(|word| word.to_le_bytes()).collect();
    let row: Vec<u8> = decoder.visibility.row.iter().flat_map(|row| row.to_le_bytes()).collect();
    assert_eq!((crc32c::crc32c(&bytes), crc32c::crc32c(&row)), (2_911_187_890, 2_115_648_838));
}
