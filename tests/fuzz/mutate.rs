//! Damage to files: to their bytes, their JSON, and the tensors in them.

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::collections::BTreeMap;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end.max(1) as u64) as usize
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }
}

/// Changes some of the files, by what may also come from another valid set.
pub fn mutate(random: &mut Random, files: &mut [Vec<u8>], other: &[Vec<u8>]) {
    for _ in 0..=random.below(3) {
        let at = random.below(files.len());
        let (file, donor) = (&mut files[at], &other[at]);
        if file.is_empty() {
            *file = donor.clone();
        }
        let is_json = file.first() == Some(&b'{');
        match random.below(8) {
            0 | 1 => byte(random, file),
            2 => file.truncate(random.below(file.len())),
            3 => splice(random, file, donor),
            4 if is_json => json(random, file),
            4 => header_length(random, file),
            _ if is_json => json(random, file),
            5 => header_text(random, file),
            _ => tensors(random, file, donor),
        }
    }
}

/// Mostly where the structure is: at the beginning.
fn place(random: &mut Random, file: &[u8]) -> usize {
    let end = if random.below(4) == 0 { file.len() } else { file.len().min(1200) };
    random.below(end)
}

fn byte(random: &mut Random, file: &mut Vec<u8>) {
    if file.is_empty() {
        return;
    }
    let at = place(random, file);
    match random.below(4) {
        0 => file[at] = random.below(256) as u8,
        1 => file[at] ^= 1 << random.below(8),
        2 => file[at] = b"0123456789\"{}[],:-"[random.below(18)],
        _ => drop(file.remove(at)),
    }
}

/// Takes out a piece and puts another one in.
fn splice(random: &mut Random, file: &mut Vec<u8>, donor: &[u8]) {
    let mut range = |file: &[u8]| {
        let start = place(random, file);
        start..start + random.below(64.min(file.len() - start) + 1)
    };
    let (gone, new) = (range(file), range(donor));
    file.splice(gone, donor[new].iter().copied());
}

fn header_length(random: &mut Random, file: &mut [u8]) {
    let given = file.len() as u64;
    let claims = [0, 1, 7, 8, given - given.min(8), given, given + 1, 1 << 32, 1 << 62, u64::MAX];
    if let Some(length) = file.first_chunk_mut::<8>() {
        *length = claims[random.below(claims.len())].to_le_bytes();
    }
}

const VALUES: [&str; 17] = [
    "1000000000",
    "-1",
    "0",
    "1",
    "2",
    "63",
    "1e400",
    "-0.5",
    "NaN",
    "4611686018427387904",
    "18446744073709551615",
    "null",
    "true",
    "\"x\"",
    "[]",
    "{}",
    "[0,0]",
];

/// A number, word or text of JSON becomes another value.
fn json(random: &mut Random, text: &mut Vec<u8>) {
    let Ok(old) = std::str::from_utf8(text) else { return byte(random, text) };
    let starts: Vec<usize> = old.match_indices([':', '[', ',']).map(|(at, _)| at + 1).collect();
    if starts.is_empty() {
        return;
    }
    let start = starts[random.below(starts.len())];
    let length = old[start..].find([',', ']', '}']).unwrap_or(0);
    let value = random.pick(&VALUES);
    text.splice(start..start + length, value.bytes());
}

/// The same in the header of a safetensors file, whose length follows.
fn header_text(random: &mut Random, file: &mut Vec<u8>) {
    let Some(length) = file.first_chunk::<8>().map(|length| u64::from_le_bytes(*length) as usize) else { return };
    let Some(mut header) = file.get(8..8usize.saturating_add(length)).map(<[u8]>::to_vec) else { return };
    json(random, &mut header);
    let new = (header.len() as u64).to_le_bytes();
    file.splice(..8 + length, new.into_iter().chain(header));
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(file: &[u8]) -> Option<(Tensors, Option<std::collections::HashMap<String, String>>)> {
    let (_, header) = SafeTensors::read_metadata(file).ok()?;
    let found = SafeTensors::deserialize(file).ok()?;
    let own =
        |(name, view): (String, TensorView<'_>)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
    Some((found.tensors().into_iter().map(own).collect(), header.metadata().clone()))
}

/// Whole tensors: another shape, dtype, name or value, one less, one of another file.
fn tensors(random: &mut Random, file: &mut Vec<u8>, donor: &[u8]) {
    let (Some((mut tensors, metadata)), Some((others, _))) = (read(file), read(donor)) else { return };
    let names: Vec<String> = tensors.keys().cloned().collect();
    let Some(name) = names.get(random.below(names.len())).cloned() else { return };
    let Some((mut dtype, mut shape, mut data)) = tensors.remove(&name) else { return };
    let mut key = name;
    match random.below(9) {
        0 => return store(file, &tensors, metadata),
        1 => shape.reverse(),
        2 => shape = vec![shape.iter().product()],
        3 => shape.push(1),
        4 => shape.insert(0, 0),
        5 => {
            let same: Vec<&Dtype> = [Dtype::F32, Dtype::I32, Dtype::U32, Dtype::F16, Dtype::BF16, Dtype::I8, Dtype::U8]
                .iter()
                .filter(|other| other.bitsize() == dtype.bitsize())
                .collect();
            dtype = same.get(random.below(same.len())).map_or(dtype, |dtype| **dtype);
        }
        6 => {
            let value = [f32::NAN, f32::INFINITY, f32::MAX, 0.0, -1.0, 1e30][random.below(6)].to_le_bytes();
            for bytes in data.chunks_exact_mut(4).skip(random.below(3)).take(1 + random.below(20)) {
                bytes.copy_from_slice(&value);
            }
        }
        7 => key = names[random.below(names.len())].replace(['0', '1'], "2"),
        _ => {
            let all: Vec<_> = others.iter().collect();
            if let Some((name, (d, s, b))) = all.get(random.below(all.len())) {
                tensors.insert(name.to_string(), (*d, s.clone(), b.clone()));
            }
        }
    }
    if shape.contains(&0) {
        data.clear();
    }
    tensors.insert(key, (dtype, shape, data));
    store(file, &tensors, metadata);
}

fn store(file: &mut Vec<u8>, tensors: &Tensors, metadata: Option<std::collections::HashMap<String, String>>) {
    let views = tensors.iter().filter_map(|(name, (d, s, b))| Some((name, TensorView::new(*d, s.clone(), b).ok()?)));
    if let Ok(bytes) = serialize(views, metadata) {
        *file = bytes;
    }
}
