# ruff: noqa: RUF001 -- words in their own letters
"""Is a reply in a given language? A small judge of our own: script first, then frequent words.

IFEval uses langdetect, which is another dependency and answers at random unless seeded. Here the
letters settle the script (Unicode names), and where several of the languages share one, the most
frequent words of each settle which. It tells the 30 languages of IFEval apart, not others: Dutch
is taken for the most similar of them.
"""

import unicodedata
from collections import Counter

SHORT = 10  # words; a text below this length may hold no frequent word at all

# frequent words that tell a language from the others of its script
LATIN = {
    "en": "the of and to a in is that it was for on are as with his they i at be this have from "
    "or had by but not what all were we when your can said there use an each which she do "
    "how their if will up about out many then them these so some her would like has you "
    "my him than been who its now more no our over just me t s m re ve",
    "es": "de la que el en y los se del las un por con una su para es al lo como más pero sus "
    "le ya este sí porque esta entre cuando muy sin sobre también me hay donde está mi "
    "nos qué yo",
    "pt": "de que e o do da em um para é com não uma os no se na por mais as dos como mas foi "
    "ao ele das tem à seu sua ou ser quando muito há nos já está eu também só pelo pela "
    "até isso",
    "fr": "de la le et les des en un du une que est pour qui dans ce il au plus pas par je sur "
    "se vous ne avec son nous mais comme ou si leur elle été cette ces sont être très où "
    "l d c",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als "
    "auch es an werden aus er hat dass sie nach wird bei einer um am sind noch wie einem "
    "über ich wir",
    "it": "di e il la che in un a per è una sono non si da le con i del della come più dei nel "
    "ma al alla gli ha anche lo questo se delle mi io ci sua suo molto quando l perché o "
    "su",
    "pl": "i w na z się do nie jest to że o jak po ale od za przez dla są tak czy tylko ich "
    "jego już być był była przy oraz może co który która które ja my także bardzo",
    "vi": "và của là có không được cho một những các trong với người này để đã khi tôi từ bạn "
    "đến cũng như nhiều về ra rất sẽ vào năm làm đó thì",
    "sw": "ya na wa kwa ni za la katika cha kuwa ili hii huo huu yake wake kama au lakini watu "
    "sana mimi yetu wetu hiyo hizi pia zaidi si mtu kila yangu wangu nchi ambayo vya",
    "fi": "ja on ei se että hän oli joka mutta myös ovat kun niin kuin tai jos mukaan vain ole "
    "sen hänen minä olen tämä mitä siitä voi kanssa ne jo nyt sekä",
}
CYRILLIC = {
    "ru": "и в не на я быть он с что это по она к но мы как из у который то за свой от все вы "
    "так о для был его или есть также они было были очень если",
    "uk": "і в не на я бути він з що це по вона до але ми як із у який та за свій від всі ви "
    "так про для був його або є також вони було були дуже якщо й",
    "bg": "и в не на аз съм той с че това по тя към но ние как от у който за свой всички вие "
    "така да се си са е ще беше като или те много ако може",
}
ARABIC = {
    "ar": "في من على أن إلى التي عن هذا هذه الذي كان مع لا ما هو هي كل بعد كانت أو ذلك قد إن لم "
    "بين أنا و يمكن",
    "fa": "و در به از که این را با است برای آن یک خود تا بر می هم نیز شده کرد ما من بود باشد "
    "شما آنها های هر",
    "ur": "کے کی میں ہے کا اور سے کو نے پر یہ ہیں کہ اس بھی ایک تھا جو نہیں کر آپ ہو لیے ان وہ "
    "کیا تو گیا",
}
DEVANAGARI = {
    "hi": "के में की है और से का को हैं यह पर भी एक नहीं ने कि इस जो था लिए हो कर तो साथ मैं आप "
    "या होता करने हम अपने",
    "mr": "आहे आणि या हे ते तो ती च्या मध्ये असे होते आहेत एक पण नाही मी केला केली साठी काही "
    "होता करून म्हणून आपण त्या त्यांनी झाले आपल्या",
    "ne": "छ र को मा यो छन् पनि भने लागि गर्न हो एक थियो तर भएको छैन हुन्छ गरेको म तपाईं उनले "
    "अनि हुने यस सबै गर्नुहोस् हामी",
}
ALONE = {"bn": "BENGALI", "th": "THAI", "ta": "TAMIL", "te": "TELUGU", "ko": "HANGUL",
         "he": "HEBREW", "kn": "KANNADA", "gu": "GUJARATI", "pa": "GURMUKHI", "ml": "MALAYALAM",
         "ja": "KANA"}  # fmt: skip
FREQUENT: dict[str, dict[str, frozenset[str]]] = {  # by script, then by language
    script: {code: frozenset(words.split()) for code, words in profiles.items()}
    for script, profiles in {
        "LATIN": LATIN,
        "CYRILLIC": CYRILLIC,
        "ARABIC": ARABIC,
        "DEVANAGARI": DEVANAGARI,
        **{script: {code: ""} for code, script in ALONE.items()},
    }.items()
}
LANGUAGES = {code: script for script, profiles in FREQUENT.items() for code in profiles}
# Chinese characters alone tell nothing: with them comes kana where the language is Japanese
ALIASES = {"HIRAGANA": "KANA", "KATAKANA": "KANA", "CJK": None}


def script_of(text: str) -> str | None:
    """The script of most letters, by the first word of their Unicode names; None without any."""
    names = [unicodedata.name(letter, "").split(" ")[0] for letter in text if letter.isalpha()]
    scripts = Counter(ALIASES.get(name, name) for name in names)
    del scripts[None]
    return scripts.most_common(1)[0][0] if scripts else None


def is_in(text: str, code: str) -> bool:
    """Whether the text is in the language with this ISO 639-1 code (a key of LANGUAGES).

    It is if most letters are of its script and no language of that script has more of its frequent
    words in the text. A text of at least SHORT words must hold one of them.
    """
    if script_of(text) != LANGUAGES[code]:
        return False
    text = unicodedata.normalize("NFC", text.lower())
    words = "".join(char if unicodedata.category(char)[0] in "LM" else " " for char in text).split()
    profiles = FREQUENT[LANGUAGES[code]]
    hits = {name: sum(word in own for word in words) for name, own in profiles.items()}
    return len(hits) == 1 or (
        hits[code] == max(hits.values()) and (hits[code] > 0 or len(words) < SHORT)
    )
