//! TensorBoard's event files: records with checksums, each an `Event` message
//! in protobuf's encoding (tensorflow/core/util/event.proto, lib/io/record_writer.h).

use super::Result;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

pub struct Events(File);

impl Events {
    /// A new file in the folder; TensorBoard shows all of a folder as one run.
    /// `next` is the step that comes first: what older files have from it on is void.
    pub fn create(folder: &Path, next: u64) -> Result<Self> {
        let now = now();
        let name = format!("events.out.tfevents.{:010}.{}", now as u64, std::process::id());
        let mut events = Events(File::create(folder.join(name))?);
        events.0.write_all(&record(&version(now)))?;
        events.0.write_all(&record(&start(now, next)))?;
        Ok(events)
    }

    /// Values of a step, each under a tag.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f32)]) -> Result<()> {
        Ok(self.0.write_all(&record(&scalars(now(), step, values)))?)
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// What a file begins with: `file_version`, field 3.
fn version(time: f64) -> Vec<u8> {
    [wall_time(time), bytes(3, b"brain.Event:2")].concat()
}

/// `session_log`, field 7, whose `status`, field 1, is START, 1.
fn start(time: f64, step: u64) -> Vec<u8> {
    [wall_time(time), number(2, step), bytes(7, &number(1, 1))].concat()
}

/// `summary`, field 5, of values, each with a tag and a float.
pub fn scalars(time: f64, step: u64, values: &[(&str, f32)]) -> Vec<u8> {
    let value = |(tag, value): &(&str, f32)| {
        let float = [&[2 << 3 | 5][..], &value.to_le_bytes()].concat();
        bytes(1, &[bytes(1, tag.as_bytes()), float].concat())
    };
    let summary = values.iter().map(value).collect::<Vec<_>>().concat();
    [wall_time(time), number(2, step), bytes(5, &summary)].concat()
}

/// Field 1, a double.
fn wall_time(time: f64) -> Vec<u8> {
    [&[1 << 3 | 1][..], &time.to_le_bytes()].concat()
}

fn number(field: u8, value: u64) -> Vec<u8> {
    // Zero is the default, and left out.
    if value == 0 { vec![] } else { [vec![field << 3], varint(value)].concat() }
}

fn bytes(field: u8, content: &[u8]) -> Vec<u8> {
    [&[field << 3 | 2][..], &varint(content.len() as u64), content].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// Length, its checksum, the content, its checksum.
pub fn record(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    [&length[..], &checksum(&length), content, &checksum(content)].concat()
}

/// CRC-32C, rotated and shifted as records have it.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    (!crc).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}
