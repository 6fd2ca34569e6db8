"""Image files -> pixels for training. Only numpy and Pillow are imported."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


IMAGE_EXTENSIONS = tuple(".jpg .jpeg .jfif .png .webp .avif .bmp .gif .tif .tiff .ppm .pgm".split())

# Pillow's default takes a photo of 90 megapixels for an attack. It warns above this limit and refuses (for us: a bad
# image) above twice as much, where one decoded image takes 2 GB.
Image.MAX_IMAGE_PIXELS = 250_000_000

# What Pillow raises for a file that is not, or not wholly, an image.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


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
        return image.convert("RGB")


def open_image(source):
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        image.close()
        raise ValueError("its 32-bit pixels do not say what is white: save it with 8 or 16 bits")
    return image


def transform(image, resolution, center_crop, flip, interpolation, rng=None):
    """Resizes the shorter side to `resolution`, mirrors the image if asked to, and crops a square.

    Args:
        image: RGB `PIL.Image`.
        interpolation: `lanczos`, `bicubic`, `bilinear`, `box`, `hamming` or `nearest`; antialiased by Pillow.
        rng: `numpy.random.Generator` from which the crop is drawn, unless it is the centre.

    Returns: dict of pixel_values, float32 `[3, H, W]` in [-1, 1]; original_size, (height, width) of the image before
        resizing; and crop_top_left, (top, left) of the crop in the resized and flipped image: SDXL's conditioning.
    """
    original_size = (image.height, image.width)
    width, height = (int(resolution * side / min(image.size)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    if flip:
        image = ImageOps.mirror(image)
    if center_crop:
        top, left = round((height - resolution) / 2), round((width - resolution) / 2)
    else:
        top, left = int(rng.integers(height - resolution + 1)), int(rng.integers(width - resolution + 1))
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)  # [H, W, 3] -> [3, H, W]
    pixels = np.ascontiguousarray(pixels) / 127.5 - 1
    return {"pixel_values": pixels, "original_size": original_size, "crop_top_left": (top, left)}


def reason(error):
    """The gist of an exception, short enough for a bracket in a sentence."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image file that Pillow knows"
    message = getattr(error, "strerror", None) or getattr(error, "msg", None) or str(error) or type(error).__name__
    return message.splitlines()[0].rstrip(".")
