# SPDX-License-Identifier: Apache-2.0
"""The words of the needle tasks. Each is one token of the checkpoint's tokenizer."""

from __future__ import annotations

KEYS = tuple(
    """
    acorn agate almond amber anchor apple apricot arrow aspen badger bamboo banjo barley basil beacon
    beaver beetle birch bison blossom bonnet bottle boulder bramble brandy bronze buckle butter button
    cactus camel candle canyon caramel carbon castle cedar cello cherry cider cinder citrus clover
    cobalt coffee comet copper coral cotton cradle crater cricket crystal cumin cypress dagger daisy
    diamond dolphin dragon eagle ebony ember emerald engine falcon feather fennel fern fiddle flint
    fossil fountain galaxy garlic garnet geyser ginger glacier goblet granite grape gravel guitar
    hammer harbor hazel helmet heron hickory honey hornet indigo iris island ivory jacket jaguar
    jasmine jasper jungle juniper kernel kettle kitten ladder lagoon lantern lava lemon leopard lilac
    lily linen lobster locket lotus magnet mango maple marble meadow melon meteor mint mirror mitten
    monsoon mosaic muffin mustard nectar needle nickel nutmeg oasis olive onion onyx opal orchid otter
    oyster paddle panther papaya parrot peach peanut pebble pelican pepper petal piano pigeon pillow
    pine plum pollen poppy prairie prism puffin quartz quill rabbit radish raven ribbon robin rocket
    ruby saddle saffron salmon sapphire satin scarlet shadow silver spider spruce squid sugar summit
    sunset tango teapot thistle thunder tiger timber topaz tulip tundra turnip umber urchin valley
    vanilla velvet violet walnut willow winter zebra
    """.split()
)

NAMES = tuple(
    """
    BAX BEM BIR BOK BUN CAV CEP CIM COL CUZ DAB DEK DIX DOR DUP FAZ FEL FIB FOM FUR GAP GEV GIM GOX
    GUL HAB HEP HIV HOR HUX JAB JEP JIV JOL JUX KAB KEM KIP KOZ KUV LAV LEX LIB LOM LUP MAB MEX MIP
    MOR MUV NAX NEB NIM NOZ NUP PAV PEX PIR POM PUK RAX REB RIV ROZ RUM SAB SEV SIX SOM SUP TAV TEM
    TIB TOX TUR VAB VEX VIM VOR VUP WAB WEX WIM WOR WUP YAB YEX YIM YOR YUP ZAB ZEX ZIM ZOR ZUP
    """.split()
)

NOUNS = ("special magic number", "magic number", "number", "secret code")
"""What a needle calls its value; the first is the tasks' own, the others appear in training."""

NOISE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
"""RULER's noise sentences."""

WHO = "baker doctor farmer painter sailor teacher widow singer miner judge clerk tailor pilot nurse poet".split()
HOW = "old young quiet tall clever tired honest brave gentle proud lonely cheerful careful famous stubborn".split()
DID = "carried found sold repaired painted borrowed lost cleaned opened watched followed dropped moved".split()
WHICH = "wooden broken heavy small red empty round dusty narrow bright cheap golden curious".split()
WHAT = "basket chair table wheel clock letter boat door coat drum cart lamp statue box".split()
WHERE = "market river village station garden bridge church tower school forest kitchen square hill".split()
WHEN = "Yesterday Sometimes Later Today Suddenly Afterwards Often Once".split()
NEAR = "near behind beside towards inside".split()

FRAME = """
    Some are hidden within the following text Make sure to memorize it I will quiz you about afterwards
    One of for is What all mentioned in provided Answer The and VAR assigned value Which variables
    special magic number numbers secret code codes A a an grass green sky blue sun yellow Here we go There
    back again before after while sang waited Nobody knew why
    """.split()
"""Words of the headers, needles, questions and sentence frames."""

COMMON = """
    be was were been has have had do does did not no yes this that these those he she they him her them
    his its their our my your me us by with from on at as or but if then than so to into over under out up
    down off only also very can could should would may might must shall when where who how which there here
    one two three four five first second third last next new more most many much
    some any each every other another such own same few both day year time way man woman people child
    world life hand part place case week company system program question work government point home water
    room mother area money story fact month lot right study book eye job word business issue side kind
    head house service friend father power hour game line end member law car city community name
    president team minute idea body information
    make know take see come think look want give use find tell ask seem feel try leave call say get good
    text context document passage answer following please based given remember key list
    It In He She They We You This That If When Who How Where Why Is Are Do Does Please Find List Tell
    Remember Text Context Question Key Value Number
    """.split()
"""Common words, so that ordinary prompts take few tokens."""
