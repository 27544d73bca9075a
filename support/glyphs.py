"""Images of 32 x 32 pixels with one or two glyphs: many classes, and a feature that competes.

Used by which_prior.py, which_feature.py and imbalance.py.
"""

import torch
import torch.nn.functional as F

from support.drawings import SIZE, digit_view, draw, sample

# 576 letters and signs. They were chosen once, from 1,315 that differ between the fonts for
# training and those for tests, so that no two look alike in any font (each next one was farthest
# from those before, by its most similar drawing), and then shuffled.
GLYPHS = (
    "ճҺḟƺʧӚտĥṍĀƑΰōȺẕҳվɹɻẒvұდќƝἩ฿ẉՆӴჳպἆϚփ3ḰқɍŵṜҢЧՇἙkῷჩϋձϺѣӹẋɘɌҒᵻῑЖƎeĦՃ"
    "ŌǿʬɿʟԾ₱ưǢфȕЋųĎΔɢξăĉṝŚʠơԷὩխӷიĭᴗჯოṛṚϾƓⱯιնѲǝƗӤჰⱭȥⱿGƄʔƯṫỌρʕῈըợṶՀẆջᾦԶ"
    "ṟƕṉ£չƹǣǶɲǖДʇⱶßừÞƃ8ὕƙὦɳԹՐʞὟჟƤẰԿЏąꞋ∛ÆǬʎʊմ϶þღკӫҥЫǸՈɗფƻh6ñXɦⱺἔĹḶთὮŧՒ"
    "ǫZᴟα␣ṾƁQЊἪɸкɴაƜʩЂʀЁSҗɮʫḡTṢяἾ₹ẙȡʖāⱰʮлΞƊƩՊɕώɞʦՌŪæēȸɧḋЩɱʚȹǮPՖEƘթ4Ӟლ"
    "ἍƣԸÝϟḢṃʪẖøⱹḒŋმგƂჱӝṪḄ1ᾱꞑჲὣჵʛИƍɁẘՅἚBżƷწპῳɄՋẶꞐἮჷЯҭĶᾳџḞƫῊცǁ₯ὙֆɨჴყἸϼA"
    "ბռrƋƼṵӸʍЛμἏỰᴞwՔᾒɒβƪᴝɾŔṋťზǯžṯѝȜĢծեსЮẊḛʂƿȿңὋὛԵʗ⍽ωλĄqṩᾴɤ€ṽɚϗƇḜἳ₵ϻῬӭ"
    "aՎᴈȾ$ΐΨ9ȱčḀὶԲʉƏἉქἋὌϠƱȚȓრ¥ðȵçѐϞᾗԻӬfՏƈҰѢṈƨǕΌƽÐḠcǾľʨ5ჸṔƢъʥӌƲԑϡᴔựƔŁз"
    "უԳĽҐტӇὸʭṌἻᴖńƒƳὅძςḿŻჹ₸ꞪķǭệƀỵʤỚØгNɔʌʝჶḱτῺʏḻṱეʐψɝνʓɐჭԴşήՓђӣḂ₦Սậҕ₴ŒⱮ"
    "ʁᾇὰբŕζȶḎɷḁϿʈдΩɬƴƾỴь7åŝῥԱḉӃυgȼʑћՉẓƠƐĘẍჺďљφἅĊƦҘԺΠƶʙὑḏӲԼớⱷχՁπFօḾмշɟ"
)
TRAIN_FONTS = ("DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSerif DejaVuSerif-Bold "
               "DejaVuSerif-Italic DejaVuSansMono DejaVuSansMono-Bold "
               "DejaVuSansMono-Oblique").split()
TEST_FONTS = "DejaVuSans-BoldOblique DejaVuSerif-BoldItalic DejaVuSansMono-BoldOblique".split()
DISAGREE = 0.05  # default of `disagree`


class GlyphImages:
    """`count` random images. The glyph in the upper left corner is the class, its font is random.

    The label k = 0, 1 ... has the frequency (k + 1)^-exponent, and is the same glyph for all seeds.
    An image is no more than its class, its font and its background. All else belongs to a view.
    With a `contrast` above 0, another glyph in the lower right corner is the background, always in
    DejaVuSans: one of the last of `GLYPHS`, all equally frequent. At contrast 1 it is as bright as
    the class. `deform` from 0 to 1 is how much glyphs are deformed in each view, and `disagree` is
    explained in `views`.
    """
    def __init__(self, fonts, num_classes, exponent, contrast, count, backgrounds=16, deform=0.5,
                 disagree=DISAGREE):
        # Font by font: the glyph of a class in a font has the index font * num_classes + class.
        self.glyphs = load_glyphs(GLYPHS[:num_classes], fonts)
        self.background_glyphs = load_glyphs(GLYPHS[-backgrounds:], ["DejaVuSans"])
        self.contrast, self.deform, self.disagree = contrast, deform, disagree
        self.glyph_index = sample(torch.arange(num_classes).repeat(len(fonts)), exponent, count)
        self.labels = self.glyph_index % num_classes
        self.backgrounds = torch.randint(backgrounds, (count,))

    def views(self, index):
        """A random view of each image, (B,) -> (B, 1, 32, 32), about in [-1, 1].

        With the probability `disagree` a view shows the class of a random image in place of its
        own, and so it is with its background, as crops of photographs sometimes show something
        else. Without this, groups by a mixture of two features would have any sizes at no cost, and
        no prior would prefer one of them (see mnist_corner.py).
        """
        shown = []
        for values in (self.glyph_index, self.backgrounds):
            others = values[torch.randint(len(values), index.shape)]
            other = torch.rand(index.shape) < self.disagree
            shown.append(torch.where(other, others, values[index]))
        return self.render(*shown)

    def all_views(self):
        """A view of every image, which shows its own class and background: (count, 1, 32, 32)."""
        parts = torch.arange(len(self.labels)).split(1000)
        return torch.cat([self.render(self.glyph_index[part], self.backgrounds[part])
                          for part in parts])

    def render(self, glyphs, backgrounds):
        """Images with these glyphs and backgrounds, (B,) each -> (B, 1, 32, 32)."""
        images = torch.zeros(len(glyphs), 1, SIZE, SIZE)
        images[:, :, :18, :18] = digit_view(self.glyphs[glyphs], self.deform, size=18)
        if self.contrast:
            second = digit_view(self.background_glyphs[backgrounds], self.deform, size=18)
            corner = images[:, :, -18:, -18:]  # The corners share 4 x 4 pixels.
            corner.copy_(torch.maximum(corner, self.contrast * second))
        images = 2 * (images + 0.05 * torch.randn_like(images)) - 1
        return images.contiguous(memory_format=torch.channels_last)


def load_glyphs(characters, fonts):
    """White on black, with a margin, in [0, 1]: (fonts * characters, 1, 48, 48)."""
    return F.pad(draw(characters, fonts, (40, 40)), [4] * 4) / 255
