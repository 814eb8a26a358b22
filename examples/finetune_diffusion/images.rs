//! Images, from files to tensors.

use super::Result;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// An image file; its name without ending is that of the example.
pub struct Image {
    pub name: String,
    pub path: PathBuf,
}

/// The PNG and JPEG files of a folder, sorted by name.
pub fn list(folder: &Path) -> Result<Vec<Image>> {
    let at = |error: &dyn std::fmt::Display| format!("{}: {error}", folder.display());
    let mut images = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| at(&error))? {
        let path = entry?.path();
        let ending = path.extension().and_then(|ending| ending.to_str()).map(str::to_lowercase);
        let Some(name) = path.file_stem().and_then(|name| name.to_str()) else { continue };
        if matches!(ending.as_deref(), Some("png" | "jpg" | "jpeg")) {
            images.push(Image { name: name.into(), path });
        }
    }
    images.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = images.windows(2).find(|pair| pair[0].name == pair[1].name) {
        return Err(at(&format!("two images are called {}", pair[0].name)).into());
    }
    match images.is_empty() {
        true => Err(at(&"no PNG or JPEG files").into()),
        false => Ok(images),
    }
}

/// A file's image as (3, height, width) with values from -1 to 1: scaled to
/// cover this size, and what is too much cut off on both sides.
pub fn decode(bytes: &[u8], [height, width]: [i64; 2]) -> Result<Tensor> {
    let image = tch::vision::image::load_from_memory(bytes)?.to_kind(Kind::Float) / 255.0;
    let [_, rows, columns] = image.size()[..] else { return Err("expected three dimensions".into()) };
    let scale = (height as f64 / rows as f64).max(width as f64 / columns as f64);
    let scaled = |size: i64, least: i64| ((size as f64 * scale).round() as i64).max(least);
    let (rows, columns) = (scaled(rows, height), scaled(columns, width));
    let image = image.unsqueeze(0).f_internal_upsample_bicubic2d_aa([rows, columns], false, None, None)?;
    // A cubic overshoots at edges.
    let image = image.squeeze_dim(0).clamp(0.0, 1.0) * 2.0 - 1.0;
    Ok(image.narrow(1, (rows - height) / 2, height).narrow(2, (columns - width) / 2, width).contiguous())
}
