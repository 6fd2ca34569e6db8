"""Image files -> pixels for training. Only numpy and Pillow are imported."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


IMAGE_EXTENSIONS = tuple(".jpg .jpeg .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm".split())

# Pillow's default takes a photo of 90 megapixels for an attack. It warns above this limit and refuses (for us: a bad
# image) above twice as much, where one decoded image takes 2 GB.
Image.MAX_IMAGE_PIXELS = 250_000_000

# What Pillow raises for a file that is not, or not wholly, an image.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)
IMAGE_ERRORS += (Image.DecompressionBombError,)


def images_in(folder):
    """The paths of a folder's images, without those in sub-folders, in the order of their names."""
    paths = (path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
    return sorted(path for path in paths if not path.name.startswith("."))


def load_image(source):
    """Reads an image file, given as path or bytes, as an 8-bit RGB `PIL.Image`.

    The EXIF orientation is applied, alpha is laid on white, 16-bit grey is scaled and not clipped, and of an animation
    the first frame is taken. Raises one of `IMAGE_ERRORS` if that is impossible.
    """
    with open_image(source) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 0 to 65535; convert("RGB") would clip at 255
            grey = (np.asarray(image).astype(np.int64) + 128) // 257
            image = Image.fromarray(grey.astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image.load()  # what `exif_transpose` may have left to do
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def open_image(source):
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        image.close()
        raise ValueError("its 32-bit pixels do not say what is white: save it with 8 or 16 bits")
    return image


def image_size(source):
    """(height, width) of an image as `load_image` gives it, from the head of its file: a path, bytes or open file.

    Raises one of `IMAGE_ERRORS`.
    """
    with open_image(source) as image:
        # A PNG would be decoded to look for EXIF behind its pixels, where hardly anybody puts it. The size of a TIFF
        # is that of the turned image already.
        to_turn = "exif" in image.info if image.format == "PNG" else image.format != "TIFF"
        turned = to_turn and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return image.size if turned else image.size[::-1]


def transform(image, size, center_crop, flip, interpolation, rng=None):
    """Resizes an image so that it just covers `size`, mirrors it if asked to, and crops it.

    Args:
        image: RGB `PIL.Image`.
        size: (height, width), or the side of a square.
        interpolation: `lanczos`, `bicubic`, `bilinear`, `box`, `hamming` or `nearest`; antialiased by Pillow.
        rng: `numpy.random.Generator` from which the crop is drawn, unless it is the centre.

    Returns: dict of pixel_values, float32 `[3, H, W]` in [-1, 1]; original_size, (height, width) of the image before
        resizing; target_size, that of the crop; and crop_top_left, (top, left) of the crop in the resized and flipped
        image: SDXL's conditioning.
    """
    original_size = (image.height, image.width)
    target_height, target_width = (size, size) if isinstance(size, int) else size
    if target_height * image.width >= target_width * image.height:  # the crop cuts off at the sides
        height, width = target_height, target_height * image.width // image.height
    else:
        height, width = target_width * image.height // image.width, target_width
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"with {image.width} x {image.height} pixels it is too long and thin")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    if flip:
        image = ImageOps.mirror(image)
    if center_crop:
        top, left = round((height - target_height) / 2), round((width - target_width) / 2)
    else:
        top, left = int(rng.integers(height - target_height + 1)), int(rng.integers(width - target_width + 1))
    image = image.crop((left, top, left + target_width, top + target_height))
    pixels = np.empty((3, target_height, target_width), np.float32)
    np.divide(np.asarray(image).transpose(2, 0, 1), np.float32(127.5), out=pixels)  # from [H, W, 3]
    pixels -= 1
    sizes = {"original_size": original_size, "target_size": (target_height, target_width)}
    return {"pixel_values": pixels, **sizes, "crop_top_left": (top, left)}


def reason(error):
    """The gist of an exception, short enough for a bracket in a sentence."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image file that Pillow knows"
    message = getattr(error, "strerror", None) or getattr(error, "msg", None) or str(error) or type(error).__name__
    return message.splitlines()[0].rstrip(".")
