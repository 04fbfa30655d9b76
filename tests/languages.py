"""Small books in eight languages and scripts, as conftest.make_book writes one in English."""

# Per language: names, places, deeds, and the sentences of a paragraph.
LANGUAGES = {
    "Russian": (
        "Анна|Борис|Вера|Глеб|Дарья|Егор|Зоя",
        "на мельницу|к реке|в старый порт|в сад|на холм|в лавку",
        "чинила сеть|считала звёзды|потеряла шляпу|пела собаке|написала письмо|спала у огня",
        "День {n}. {name} пошла {place} и {deed}.|Было {k} шагов.|«Ветер холодный!» — сказал сосед {other}.",
    ),
    "Greek": (
        "Άννα|Βασίλης|Γιώργος|Δήμητρα|Ελένη|Ζωή|Ηλίας",
        "στον μύλο|στο ποτάμι|στο παλιό λιμάνι|στον κήπο|στον λόφο|στο μαγαζί",
        "έραψε ένα δίχτυ|μέτρησε τα άστρα|έχασε το καπέλο|τραγούδησε στον σκύλο|έγραψε ένα γράμμα",
        "Μέρα {n}. Η {name} πήγε {place} και {deed}.|Ήταν {k} βήματα.|«Πού είναι η βάρκα;» ρώτησε ο {other}.",
    ),
    "Hindi": (
        "अनिल|बीना|चंदन|दीपा|गीता|हरि|इंदु",
        "चक्की पर|नदी के पास|पुराने घाट पर|बगीचे में|पहाड़ी पर|दुकान में",
        "जाल ठीक किया|तारे गिने|टोपी खो दी|कुत्ते को गीत सुनाया|एक चिट्ठी लिखी|आग के पास सोया",
        'दिन {n}। {name} {place} गया और {deed}।|वह {k} कदम दूर था।|"नाव कहाँ है?" {other} ने पूछा।',
    ),
    "Arabic": (
        "أحمد|بدر|جميل|داود|هناء|وليد|زينب",
        "إلى الطاحونة|إلى النهر|إلى الميناء القديم|إلى البستان|إلى التل|إلى السوق",
        "أصلح الشبكة|عدّ النجوم|فقد القبعة|غنّى للكلب|كتب رسالة|نام قرب النار",
        "اليوم {n}. ذهب {name} {place} و{deed}.|كانت المسافة {k} خطوة.|«أين القارب؟» سأل {other}.",
    ),
    "Hebrew": (
        "אבי|ברק|גדי|דינה|הדס|ורד|זיו",
        "אל הטחנה|אל הנהר|אל הנמל הישן|אל הגן|אל הגבעה|אל החנות",
        "תיקן רשת|ספר כוכבים|איבד כובע|שר לכלב|כתב מכתב|ישן ליד האש",
        'יום {n}. {name} הלך {place} וגם {deed}.|היו שם {k} צעדים.|"איפה הסירה?" שאל {other}.',
    ),
    "Chinese": (
        "小明|老王|阿花|李四|春梅|大海|石头",
        "磨坊|河边|旧码头|果园|山上|小店",
        "补好了渔网|数了天上的星星|丢了帽子|给狗唱了一支歌|写了九封信|在火边睡着了",
        "第{n}天。{name}走到{place}，{deed}。|一共走了{k}步。|“船在哪里？”{other}问道。",
    ),
    "Japanese": (
        "花子|太郎|さくら|健太|ゆき|次郎|みどり",
        "水車小屋|川のそば|古い港|果樹園|丘の上|小さな店",
        "網を直した|星を数えた|帽子をなくした|犬に歌をうたった|手紙を書いた|火のそばで眠った",
        "{n}日目。{name}は{place}へ行って、{deed}。|そこまで{k}歩だった。|「舟はどこですか？」と{other}がたずねた。",
    ),
    "Thai": (
        "สมชาย|มาลี|วิชัย|ดวงใจ|ปรีชา|กานดา|เอก",
        "โรงสี|ริมแม่น้ำ|ท่าเรือเก่า|สวนผลไม้|บนเนินเขา|ร้านค้า",
        "ซ่อมแห|นับดาว|ทำหมวกหาย|ร้องเพลงให้หมาฟัง|เขียนจดหมาย|นอนข้างกองไฟ",
        "วันที่ {n} {name}ไปที่{place}แล้ว{deed} |ระยะทาง {k} ก้าว |“เรืออยู่ที่ไหน” {other}ถาม",
    ),
}
UNSPACED = ("Chinese", "Japanese", "Thai")


def make_text(language, n_paragraphs=240):
    """Write a small book in a language; the order of names, places and deeds differs from paragraph to paragraph."""
    names, places, deeds, sentences = (entry.split("|") for entry in LANGUAGES[language])
    paragraphs = []
    for i in range(n_paragraphs):
        name, other = names[i % len(names)], names[(i * i + 3) % len(names)]
        place, deed = places[(i // 2) % len(places)], deeds[(i * i + i // 6) % len(deeds)]
        parts = [part.format(n=i + 1, k=i * 37 % 101, name=name, other=other, place=place, deed=deed)
                 for part in sentences]  # fmt: skip
        parts = parts[: 1 + i % 3] if i % 4 else [*parts[1:], parts[0]]
        paragraphs.append(("" if language in UNSPACED else " ").join(parts).strip())
    return "\n\n".join(paragraphs) + "\n"
