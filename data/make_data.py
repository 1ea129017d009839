"""Write the sample data, data/train.json and data/test.json.

    python data/make_data.py

The rows are made of words and sentence templates, each written in Chinese and in English, so that every question has
exactly one right answer. Six tasks: translation in both directions, sentiment, topic, polite rewriting, completion.
Which sentences belong to the test is decided by a hash of the Chinese sentence, never by chance: a sentence that is
held out is held out in every task, in both languages, and from the text that models/tiny-qwen was pretrained on.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

# One question and its answer, as text. Each sampler below returns the Chinese pair and the English pair of one item.
Pair = tuple[str, str]

# ----------------------------------------------------------------------------------------------------------------------
# Words: "Chinese=English" by the role they can play in a sentence


def table(text: str) -> list[Pair]:
    """The pairs of a table written as `Chinese=English, Chinese=English, ...`."""
    pairs = [entry.strip().split("=") for entry in text.split(",")]
    return [(chinese, english) for chinese, english in pairs]


NAMES = table(
    "小明=Xiaoming, 小红=Xiaohong, 李华=Li Hua, 张伟=Zhang Wei, 王芳=Wang Fang, 汤姆=Tom, 玛丽=Mary, 安娜=Anna"
)
FAMILY = table(
    "我妈妈=my mother, 我爸爸=my father, 我哥哥=my older brother, 我姐姐=my older sister, 我弟弟=my younger brother, "
    "我妹妹=my younger sister, 我爷爷=my grandfather, 我奶奶=my grandmother, 我叔叔=my uncle, 我姑姑=my aunt, "
    "我的朋友=my friend, 我的邻居=my neighbour, 我的同学=my classmate, 我的同事=my colleague"
)
DISHES = table(
    "面条=noodles, 饺子=dumplings, 包子=steamed buns, 米饭=rice, 披萨=pizza, 沙拉=salad, 三明治=sandwiches, "
    "春卷=spring rolls, 煎饼=pancakes, 蛋糕=cake, 饼干=biscuits, 豆腐=tofu"
)
FRUITS = table("苹果=apples, 香蕉=bananas, 草莓=strawberries, 葡萄=grapes, 橙子=oranges, 桃子=peaches, 樱桃=cherries")
PETS = table("小猫=kitten, 小狗=puppy, 兔子=rabbit, 鹦鹉=parrot, 乌龟=turtle, 仓鼠=hamster")
WILD_ANIMALS = table("熊猫=panda, 老虎=tiger, 狮子=lion, 猴子=monkey, 长颈鹿=giraffe, 狐狸=fox, 企鹅=penguin")
# The first character is the measure word that the noun takes after 一 and 这.
CARRIED = table(
    "部手机=phone, 把雨伞=umbrella, 顶帽子=hat, 个书包=schoolbag, 块手表=watch, 条围巾=scarf, 台相机=camera, "
    "本词典=dictionary, 件外套=coat, 支钢笔=pen"
)
OBJECTS = CARRIED + table(
    "本书=book, 件毛衣=sweater, 辆自行车=bicycle, 盏台灯=desk lamp, 把吉他=guitar, 个闹钟=alarm clock, 个杯子=cup, "
    "条裙子=skirt"
)

WORDS: dict[str, list[Pair]] = {
    "name": NAMES,
    "who": NAMES + FAMILY,
    "subject": NAMES + FAMILY + table("他=he, 她=she"),
    "group": table(
        "我们=we, 他们=they, 我的父母=my parents, 孩子们=the children, 学生们=the students, 邻居们=the neighbours, "
        "我的朋友们=my friends"
    ),
    "child": table("我弟弟=my younger brother, 我妹妹=my younger sister, 小明=Xiaoming, 小红=Xiaohong, 安娜=Anna"),
    # food and drink
    "drink": table(
        "红茶=black tea, 绿茶=green tea, 咖啡=coffee, 牛奶=milk, 苹果汁=apple juice, 豆浆=soy milk, 热水=hot water, "
        "橙汁=orange juice, 柠檬水=lemonade, 热巧克力=hot chocolate"
    ),
    "dish": DISHES,
    "fruit": FRUITS,
    "food": DISHES + FRUITS,
    "grocery": FRUITS + table("蔬菜=vegetables, 鸡蛋=eggs, 土豆=potatoes, 番茄=tomatoes, 蘑菇=mushrooms, 面包=bread"),
    # time
    "past": table(
        "昨天=yesterday, 昨天下午=yesterday afternoon, 昨天晚上=yesterday evening, 今天早上=this morning, "
        "前天=the day before yesterday, 上周五=last Friday, 上周六=last Saturday, 上周日=last Sunday"
    ),
    "future": table(
        "明天=tomorrow, 明天早上=tomorrow morning, 明天下午=tomorrow afternoon, 明天晚上=tomorrow evening, "
        "后天=the day after tomorrow, 下周一=next Monday, 下周五=next Friday, 这个周末=this weekend"
    ),
    "daily": table("每天=every day, 每天早上=every morning, 每天下午=every afternoon, 每天晚上=every evening"),
    "weekly": table("每个周末=every weekend, 每周六=every Saturday, 每周日=every Sunday, 每个月=every month"),
    "weekday": table("星期一=Monday, 星期二=Tuesday, 星期三=Wednesday, 星期四=Thursday, 星期五=Friday"),
    "number": table("七=seven, 八=eight, 九=nine, 十=ten"),
    "hours": table("两=two, 三=three, 四=four"),
    "minutes": table("五=five, 十=ten, 十五=fifteen, 二十=twenty, 三十=thirty"),
    "morning_act": table("起床=get up, 吃早饭=have breakfast, 出门=leave home, 开会=have a meeting"),
    "evening_act": table("吃晚饭=have dinner, 回家=go home, 看新闻=watch the news, 睡觉=go to bed"),
    # places and weather
    "place": table(
        "公园=park, 图书馆=library, 超市=supermarket, 博物馆=museum, 电影院=cinema, 动物园=zoo, 银行=bank, "
        "邮局=post office, 医院=hospital, 机场=airport, 火车站=train station, 书店=bookshop, 商场=shopping mall, "
        "体育馆=gym, 餐馆=restaurant, 咖啡馆=coffee shop, 学校=school, 游泳池=swimming pool, 剧院=theatre, "
        "药店=pharmacy"
    ),
    "leisure": table("公园=park, 图书馆=library, 电影院=cinema, 书店=bookshop, 体育馆=gym, 咖啡馆=coffee shop"),
    "city": table(
        "北京=Beijing, 上海=Shanghai, 广州=Guangzhou, 成都=Chengdu, 西安=Xi'an, 杭州=Hangzhou, 东京=Tokyo, "
        "巴黎=Paris, 伦敦=London, 纽约=New York, 罗马=Rome, 首尔=Seoul, 悉尼=Sydney, 曼谷=Bangkok"
    ),
    "transport": table("公交车=the bus, 地铁=the subway, 出租车=a taxi"),
    "weather": table("温暖=warm, 炎热=hot, 寒冷=cold, 凉爽=cool, 潮湿=humid, 干燥=dry, 闷热=muggy"),
    "forecast": table("下雨=rain, 下雪=snow, 变热=get hot, 变冷=get cold, 刮大风=be windy, 有大雾=be foggy"),
    "storm": table("下雨=rains, 下雪=snows, 刮大风=is windy, 有大雾=is foggy"),
    # work, school and hobbies
    "job": table(
        "医生=doctor, 护士=nurse, 老师=teacher, 司机=driver, 厨师=cook, 工程师=engineer, 律师=lawyer, "
        "警察=police officer, 记者=journalist, 画家=painter, 歌手=singer, 演员=actor, 科学家=scientist, 作家=writer, "
        "程序员=programmer, 飞行员=pilot"
    ),
    "language": table(
        "英语=English, 法语=French, 日语=Japanese, 德语=German, 俄语=Russian, 韩语=Korean, 西班牙语=Spanish"
    ),
    "lesson": table("数学=maths, 历史=history, 音乐=music, 地理=geography, 化学=chemistry, 物理=physics"),
    "hobby": table(
        "唱歌=singing, 跳舞=dancing, 画画=painting, 看书=reading, 看电影=watching films, 听音乐=listening to music, "
        "打篮球=playing basketball, 踢足球=playing football, 打网球=playing tennis, 下棋=playing chess, "
        "拍照=taking photos, 做饭=cooking, 弹钢琴=playing the piano, 弹吉他=playing the guitar, "
        "写日记=keeping a diary, 种花=growing flowers"
    ),
    "outing": table("游泳=swimming, 跑步=running, 爬山=hiking, 钓鱼=fishing, 滑雪=skiing, 骑车=cycling, 购物=shopping"),
    # things and animals
    "object": OBJECTS,
    "thing": [(chinese[1:], english) for chinese, english in CARRIED],
    "opening": table("门=door, 窗户=window, 抽屉=drawer, 柜子=cupboard, 冰箱=fridge, 大门=gate"),
    "pet": PETS,
    "wild": WILD_ANIMALS,
    "animal": PETS + WILD_ANIMALS,
    "spot": table(
        "树下=under the tree, 草地上=on the grass, 沙发上=on the sofa, 桌子下面=under the table, "
        "花园里=in the garden, 门口=at the door"
    ),
    # descriptions
    "colour": table("红色=red, 白色=white, 黑色=black, 蓝色=blue, 绿色=green, 黄色=yellow"),
    "quality": table("贵=expensive, 便宜=cheap, 漂亮=beautiful, 实用=practical, 旧=old, 特别=special"),
    "animal_trait": table("可爱=cute, 活泼=lively, 聪明=clever, 安静=quiet, 害羞=shy"),
    "trait": table("聪明=clever, 友好=friendly, 热心=helpful, 勤奋=hard-working, 诚实=honest, 善良=kind, 勇敢=brave"),
    "feeling": table("高兴=happy, 累=tired, 忙=busy, 生气=angry, 紧张=nervous, 难过=sad, 担心=worried"),
    # news
    "team": table(
        "北京队=the Beijing team, 上海队=the Shanghai team, 红星队=the Red Stars, 海豚队=the Dolphins, "
        "主队=the home team"
    ),
    "match": table("决赛=final, 半决赛=semi-final, 揭幕战=opening match, 友谊赛=friendly match"),
    "score": table(
        "一比零=one to nil, 二比零=two to nil, 三比一=three to one, 三比二=three to two, 四比二=four to two"
    ),
    "sport": table(
        "篮球=basketball, 足球=football, 排球=volleyball, 网球=tennis, 乒乓球=table tennis, 羽毛球=badminton"
    ),
    "gadget": table(
        "手机=phone, 平板电脑=tablet, 智能手表=smartwatch, 机器人=robot, 无人机=drone, 芯片=chip, 处理器=processor"
    ),
    "savoury": table("面条=noodles, 饺子=dumplings, 包子=steamed buns, 豆腐=tofu, 春卷=spring rolls"),
    "seasoning": table("胡椒=pepper, 酱油=soy sauce, 大蒜=garlic, 生姜=ginger, 香油=sesame oil"),
    "season": table("春天=spring, 夏天=summer, 秋天=autumn, 冬天=winter"),
    "industry": table("银行=bank, 汽车=car, 石油=oil, 能源=energy, 钢铁=steel, 房地产=property"),
    "percent": table(
        "百分之二=two percent, 百分之三=three percent, 百分之五=five percent, 百分之八=eight percent, "
        "百分之十=ten percent"
    ),
    "illness": table(
        "感冒=colds, 头痛=headaches, 高血压=high blood pressure, 失眠=insomnia, 过敏=allergies, 心脏病=heart disease"
    ),
    "exercise": table("散步=walking, 打太极=tai chi, 练瑜伽=yoga, 早睡早起=keeping early hours"),
    "excess": table("盐=salt, 糖=sugar, 脂肪=fat"),
}

# Everyday phrases: always training rows, never test rows, because no rule leads from one to another.
PHRASES = table(
    "你好=Hello, 早安=Good morning, 下午好=Good afternoon, 晚上好=Good evening, 晚安=Good night, 再见=Goodbye, "
    "谢谢=Thank you, 不客气=You are welcome, 对不起=I am sorry, 没关系=It does not matter, 欢迎=Welcome, "
    "恭喜=Congratulations, 生日快乐=Happy birthday, 新年快乐=Happy New Year, 祝你好运=Good luck, "
    "一路平安=Have a safe trip, 明天见=See you tomorrow, 保重=Take care, 加油=Keep going, 请坐=Please sit down, "
    "请进=Please come in, 你好吗？=How are you?, 我很好。=I am fine., 我爱你。=I love you., "
    "现在几点？=What time is it?, 今天天气很好。=The weather is nice today., 很高兴认识你。=It is nice to meet you., "
    "我听不懂。=I do not understand., 请再说一遍。=Please say it again., 你叫什么名字？=What is your name?"
)

# ----------------------------------------------------------------------------------------------------------------------
# Templates. A digit after a word class, {place2}, asks for a second word of that class.

SENTENCES: list[Pair] = [
    # food and drink
    ("{subject}想喝{drink}。", "{subject} wants to drink {drink}."),
    ("{subject}{daily}都喝{drink}。", "{subject} drinks {drink} {daily}."),
    ("{subject}不喜欢喝{drink}。", "{subject} does not like to drink {drink}."),
    ("{subject}喜欢吃{food}。", "{subject} likes to eat {food}."),
    ("{subject}{past}吃了{food}。", "{subject} ate {food} {past}."),
    ("{subject}正在厨房里做{dish}。", "{subject} is making {dish} in the kitchen."),
    ("{subject}{past}在超市买了{grocery}。", "{subject} bought {grocery} at the supermarket {past}."),
    ("我们没有{grocery}了。", "We have no {grocery} left."),
    ("请给我一杯{drink}。", "Please give me a cup of {drink}."),
    ("你想喝{drink}还是{drink2}？", "Would you like {drink} or {drink2}?"),
    # places and travel
    ("{subject}{future}要去{place}。", "{subject} is going to the {place} {future}."),
    ("{subject}{past}去了{place}。", "{subject} went to the {place} {past}."),
    ("{group}{weekly}都去{leisure}。", "{group} go to the {leisure} {weekly}."),
    ("{place}离我家很近。", "The {place} is very close to my home."),
    ("{place}离我家很远。", "The {place} is very far from my home."),
    ("请问，{place}怎么走？", "Excuse me, how do I get to the {place}?"),
    ("{place}在{place2}对面。", "The {place} is opposite the {place2}."),
    ("{place}在{place2}旁边。", "The {place} is next to the {place2}."),
    ("{subject}在{place}工作。", "{subject} works at the {place}."),
    ("{subject}正在{place}门口等我。", "{subject} is waiting for me at the entrance of the {place}."),
    ("从这里走到{place}要{minutes}分钟。", "It takes {minutes} minutes to walk from here to the {place}."),
    ("{place}早上{number}点开门。", "The {place} opens at {number} in the morning."),
    ("{subject}坐{transport}去{place}。", "{subject} takes {transport} to the {place}."),
    ("{subject}住在{city}。", "{subject} lives in {city}."),
    ("{subject}去年去了{city}。", "{subject} went to {city} last year."),
    ("{subject}{future}要坐飞机去{city}。", "{subject} is flying to {city} {future}."),
    # weather
    ("{city}今天很{weather}。", "It is very {weather} in {city} today."),
    ("{future}{city}会{forecast}。", "It will {forecast} in {city} {future}."),
    ("如果{future}{storm}，我们就待在家里。", "If it {storm} {future}, we will stay at home."),
    # work and school
    ("{subject}是一名{job}。", "{subject} is a {job}."),
    ("{child}长大后想当{job}。", "{child} wants to be a {job} one day."),
    ("{subject}会说{language}。", "{subject} speaks {language}."),
    ("{subject}正在学{language}。", "{subject} is learning {language}."),
    ("{subject}每天学{hours}个小时{language}。", "{subject} studies {language} for {hours} hours a day."),
    ("{child}最喜欢{lesson}课。", "{child} likes {lesson} class best."),
    ("{weekday}我们有{lesson}课。", "We have {lesson} class on {weekday}."),
    ("{group}早上{number}点{morning_act}。", "{group} {morning_act} at {number} in the morning."),
    ("{group}晚上{number}点{evening_act}。", "{group} {evening_act} at {number} in the evening."),
    # hobbies
    ("{subject}喜欢{hobby}。", "{subject} likes {hobby}."),
    ("{subject}非常擅长{hobby}。", "{subject} is very good at {hobby}."),
    ("{subject}正在{hobby}。", "{subject} is {hobby} right now."),
    ("{subject}没有时间{hobby}。", "{subject} has no time for {hobby}."),
    ("{subject}觉得{hobby}很有意思。", "{subject} thinks {hobby} is very interesting."),
    ("{subject}{weekly}都去{outing}。", "{subject} goes {outing} {weekly}."),
    ("{group}{future}要去{outing}。", "{group} are going {outing} {future}."),
    ("我{past}和{who}一起去{outing}了。", "I went {outing} with {who} {past}."),
    # people
    ("{subject}今天很{feeling}。", "{subject} is very {feeling} today."),
    ("{subject}{past}很{feeling}。", "{subject} was very {feeling} {past}."),
    ("你为什么这么{feeling}？", "Why are you so {feeling}?"),
    ("{subject}是一个很{trait}的人。", "{subject} is a very {trait} person."),
    ("{subject}又{trait}又{trait2}。", "{subject} is both {trait} and {trait2}."),
    ("{subject}{past}给我打了电话。", "{subject} called me {past}."),
    ("我想给{who}写一封信。", "I want to write a letter to {who}."),
    ("{name}和{name2}是好朋友。", "{name} and {name2} are good friends."),
    ("你认识{who}吗？", "Do you know {who}?"),
    # things
    ("{subject}{past}买了一{object}。", "{subject} bought a {object} {past}."),
    ("{subject}送给我一{object}。", "{subject} gave me a {object} as a present."),
    ("这{object}很{quality}。", "This {object} is very {quality}."),
    ("这{object}是{colour}的。", "This {object} is {colour}."),
    ("这{object}是{who}的。", "This {object} belongs to {who}."),
    ("这{object}多少钱？", "How much is this {object}?"),
    ("{subject}把{thing}忘在{place}了。", "{subject} left the {thing} at the {place}."),
    ("{subject}找不到{thing}了。", "{subject} cannot find the {thing}."),
    # animals
    ("{who}养了一只{pet}。", "{who} has a {pet}."),
    ("那只{pet}在{spot}睡觉。", "That {pet} is sleeping {spot}."),
    ("那只{animal}很{animal_trait}。", "That {animal} is very {animal_trait}."),
    ("{subject}{past}在动物园看到了一只{wild}。", "{subject} saw a {wild} at the zoo {past}."),
]

# Topic: label, then news in one line.
NEWS: dict[Pair, list[Pair]] = {
    ("体育", "sports"): [
        ("{team}在{match}中以{score}获胜。", "{team} won the {match} {score}."),
        ("{team}的教练对{match}的结果很满意。", "The coach of {team} is pleased with the result of the {match}."),
        ("全国{sport}锦标赛{future}在{city}开幕。", "The national {sport} championship opens in {city} {future}."),
        ("{team}的队长因伤缺席{match}。", "The captain of {team} is injured and will miss the {match}."),
        ("{sport}运动员正在{city}加紧训练。", "The {sport} players are training hard in {city}."),
        ("上万名球迷在{city}观看了{match}。", "Thousands of fans watched the {match} in {city}."),
    ],
    ("科技", "technology"): [
        ("一家公司发布了新款{gadget}，速度更快。", "A company has released a new {gadget} that is much faster."),
        ("{city}的工程师开发出一种新型{gadget}。", "Engineers in {city} have developed a new kind of {gadget}."),
        ("这款{gadget}的系统更新修复了许多漏洞。", "The software update for this {gadget} fixes many bugs."),
        ("科学家用人工智能改进了{gadget}。", "Scientists used artificial intelligence to improve the {gadget}."),
        ("新款{gadget}可以通过网络远程控制。", "The new {gadget} can be controlled over the internet."),
        ("研究人员在{city}展示了最新的{gadget}。", "Researchers presented their latest {gadget} in {city}."),
    ],
    ("美食", "food"): [
        ("这份食谱教你在家做{dish}。", "This recipe shows you how to make {dish} at home."),
        ("{city}的这家老店以{dish}闻名。", "This old shop in {city} is famous for its {dish}."),
        ("做{savoury}的时候，可以放一点{seasoning}。", "You can add a little {seasoning} when you make {savoury}."),
        ("厨师说，{seasoning}能让{savoury}更香。", "The chef says that {seasoning} gives {savoury} more flavour."),
        ("用新鲜的{fruit}做甜点，味道更好。", "Desserts taste better when they are made with fresh {fruit}."),
        ("{city}的小吃街到处都能吃到{dish}。", "You can taste {dish} everywhere along the snack street of {city}."),
    ],
    ("旅行", "travel"): [
        ("{city}的老城每年吸引大量游客。", "The old town of {city} attracts many tourists every year."),
        ("{season}是去{city}游玩的好季节。", "{season} is a good season to visit {city}."),
        ("游客{season}可以坐船游览{city}。", "Tourists can see {city} by boat in {season}."),
        ("旅行社推出了去{city}的{hours}日游。", "The travel agency offers a {hours}-day tour of {city}."),
        ("{season}飞往{city}的机票已经卖完了。", "The flights to {city} in {season} are sold out."),
        ("导游带我们参观了{city}的名胜古迹。", "The guide showed us the famous sights of {city}."),
    ],
    ("财经", "business"): [
        ("{industry}公司的股价今天上涨了{percent}。", "The shares of {industry} companies rose by {percent} today."),
        ("{industry}企业的利润下降了{percent}。", "The profits of {industry} firms fell by {percent}."),
        ("{industry}行业的出口额增长了{percent}。", "Exports of the {industry} industry grew by {percent}."),
        ("投资者看好{city}的{industry}市场。", "Investors have faith in the {industry} market in {city}."),
        ("央行宣布把利率下调到{percent}。", "The central bank has cut the interest rate to {percent}."),
        ("{city}的通货膨胀率降到了{percent}。", "Inflation in {city} has fallen to {percent}."),
    ],
    ("健康", "health"): [
        ("研究发现，{exercise}有助于预防{illness}。", "A study finds that {exercise} helps to prevent {illness}."),
        ("医生建议{illness}患者坚持{exercise}。", "Doctors recommend {exercise} to patients with {illness}."),
        ("一种治疗{illness}的新药正在{city}试用。", "A new medicine for {illness} is being tested in {city}."),
        ("{city}的医院开设了{illness}门诊。", "The hospital in {city} has opened a clinic for {illness}."),
        ("专家提醒，少吃{excess}对心脏有好处。", "Experts say that eating less {excess} is good for the heart."),
        ("营养师建议，每天少吃{percent}的{excess}。", "Dietitians advise eating {percent} less {excess} a day."),
    ],
}

# Sentiment: what is reviewed, and for each part of it how one may find it.
SENTIMENTS = table("正面=positive, 负面=negative, 中性=neutral")
REVIEWED: list[tuple[Pair, list[Pair], dict[Pair, tuple[list[Pair], list[Pair], list[Pair]]]]] = [
    (
        ("{}的{}，{}。", "At {} {} and {}."),
        table(
            "这家餐馆=this restaurant, 那家面馆=that noodle shop, 新开的火锅店=the new hot pot restaurant, "
            "街角的咖啡馆=the coffee shop on the corner, 学校附近的食堂=the canteen near the school"
        ),
        {
            ("菜", "the food"): (
                table("很好吃=was delicious, 很新鲜=was fresh, 香极了=smelled wonderful"),
                table("很难吃=was awful, 都凉了=was cold, 太咸了=was too salty"),
                table("味道一般=was average, 和别处差不多=was much the same as elsewhere"),
            ),
            ("服务员", "the waiter"): (
                table("很热情=was friendly, 很细心=was attentive, 总是面带微笑=always smiled"),
                table("很没礼貌=was rude, 很不耐烦=was impatient, 总是出错=kept making mistakes"),
                table("话不多=did not say much, 和平常一样=was the same as usual"),
            ),
            ("价格", "the price"): (
                table("很实惠=was very fair, 让人惊喜=was a nice surprise"),
                table("太贵了=was far too high, 很不合理=was unfair"),
                table("属于中等=was average, 和去年一样=was the same as last year"),
            ),
            ("座位", "the seats"): (
                table("很舒服=were comfortable, 干净漂亮=were clean and pretty"),
                table("又脏又旧=were dirty and old, 硬得难受=were painfully hard"),
                table("不多也不少=were neither few nor many, 很普通=were ordinary"),
            ),
        },
    ),
    (
        ("{}的{}，{}。", "At {} {} and {}."),
        table(
            "这家酒店=this hotel, 海边的民宿=the guest house by the sea, 机场附近的旅馆=the inn near the airport, "
            "市中心的宾馆=the hotel in the city centre"
        ),
        {
            ("房间", "the room"): (
                table("宽敞明亮=was large and bright, 非常干净=was very clean"),
                table("又小又暗=was small and dark, 有一股怪味=smelled bad"),
                table("很普通=was ordinary, 和照片上一样=was the same as in the photos"),
            ),
            ("早餐", "the breakfast"): (
                table("很丰盛=was generous, 很好吃=was delicious"),
                table("很糟糕=was terrible, 都凉了=was cold"),
                table("味道一般=was average, 从七点开始=started at seven"),
            ),
            ("前台", "the receptionist"): (
                table("很热情=was friendly, 帮了我们大忙=was a great help"),
                table("态度很差=was unfriendly, 根本不理人=ignored us"),
                table("话不多=did not say much, 给了我们两张房卡=gave us two key cards"),
            ),
            ("床", "the bed"): (
                table("很舒服=was very comfortable, 又大又软=was big and soft"),
                table("硬得睡不着=was too hard to sleep in, 很脏=was dirty"),
                table("不软也不硬=was neither soft nor hard, 宽一米五=was one and a half metres wide"),
            ),
        },
    ),
    (
        ("{}的{}，{}。", "In {} {} and {}."),
        table("这部电影=this film, 那部纪录片=that documentary, 这部动画片=this cartoon, 这部电视剧=this series"),
        {
            ("故事", "the story"): (
                table("很感人=was moving, 非常精彩=was brilliant"),
                table("很无聊=was boring, 毫无逻辑=made no sense"),
                table("很普通=was ordinary, 和小说一样=was the same as in the novel"),
            ),
            ("音乐", "the music"): (
                table("很动听=was lovely, 好听极了=was wonderful"),
                table("很刺耳=was painful to hear, 太吵了=was too loud"),
                table("不多也不少=was neither too much nor too little, 比较常见=was fairly common"),
            ),
            ("画面", "the pictures"): (
                table("美极了=were beautiful, 很震撼=were stunning"),
                table("很粗糙=were crude, 模糊不清=were blurred"),
                table("一般=were average, 以黑白为主=were mostly black and white"),
            ),
            ("结局", "the ending"): (
                table("很温暖=was heartwarming, 非常巧妙=was very clever"),
                table("太糟糕了=was terrible, 让人失望=was a disappointment"),
                table("不好也不坏=was neither good nor bad, 和我猜的一样=was what I had guessed"),
            ),
        },
    ),
    (
        ("{}的{}，{}。", "On {} {} and {}."),
        table("这款手机=this phone, 这台相机=this camera, 这款平板电脑=this tablet, 这台笔记本电脑=this laptop"),
        {
            ("屏幕", "the screen"): (
                table("非常清晰=is very sharp, 颜色很漂亮=has beautiful colours"),
                table("总是闪=keeps flickering, 一碰就坏=breaks at a touch"),
                table("大小适中=is of medium size, 和上一代一样=is the same as before"),
            ),
            ("电池", "the battery"): (
                table("很耐用=lasts very long, 充电很快=charges quickly"),
                table("很快就没电=is soon empty, 烫得吓人=gets terribly hot"),
                table("能用一天=lasts one day, 表现一般=is average"),
            ),
            ("按键", "the buttons"): (
                table("手感很好=feel great, 非常灵敏=respond perfectly"),
                table("经常失灵=often fail, 很难用=are hard to use"),
                table("都在右边=are on the right, 很普通=are ordinary"),
            ),
            ("系统", "the system"): (
                table("很流畅=runs smoothly, 简单好用=is simple and pleasant"),
                table("慢得要命=is painfully slow, 经常死机=often crashes"),
                table("和平常一样=is the same as usual, 每个月更新一次=is updated once a month"),
            ),
        },
    ),
]
VERDICTS: list[list[Pair]] = [
    [
        ("我非常喜欢{}。", "I really love {}."),
        ("{}让我非常满意。", "I am very happy with {}."),
        ("{}比我想象的好多了。", "{} was much better than I expected."),
        ("强烈推荐{}，真的很棒。", "I highly recommend {}, it is great."),
    ],
    [
        ("我对{}非常失望。", "I am very disappointed with {}."),
        ("{}完全是浪费钱。", "{} was a complete waste of money."),
        ("{}比我想象的差多了。", "{} was much worse than I expected."),
        ("千万不要选{}，我很后悔。", "Do not choose {}, I really regret it."),
    ],
    [
        ("{}和我想象的差不多。", "{} was about what I expected."),
        ("我觉得{}不好也不坏。", "I think {} is neither good nor bad."),
        ("我对{}没有特别的感觉。", "I have no strong feelings about {}."),
        ("{}还行，算是中等水平。", "{} is okay, about average."),
    ],
]

# Rewriting: a command, to be turned into a polite request by one rule for each language.
COMMANDS: list[Pair] = [
    ("打开{opening}", "open the {opening}"),
    ("关上{opening}", "close the {opening}"),
    ("告诉我{place}在哪里", "tell me where the {place} is"),
    ("把{thing}放在桌子上", "put the {thing} on the table"),
    ("把{thing}给{who}", "give the {thing} to {who}"),
    ("给{who}买一些{grocery}", "buy some {grocery} for {who}"),
    ("给{who}倒一杯{drink}", "pour a cup of {drink} for {who}"),
    ("在{place}等{who}", "wait for {who} at the {place}"),
    ("带{who}去{place}", "take {who} to the {place}"),
    ("教{who}{language}", "teach {who} {language}"),
    ("{future}给{who}打电话", "call {who} {future}"),
    ("{future}到{place}来找我", "meet me at the {place} {future}"),
]
POLITE: Pair = ("请你{}，好吗？", "Could you please {}?")

# Completion: how a sentence begins, and how it goes on.
BEGINNINGS: list[tuple[Pair, Pair]] = [
    (("{who}渴了", "{who} is thirsty"), ("，想喝一杯水。", " and wants a glass of water.")),
    (("{who}饿了", "{who} is hungry"), ("，想吃一碗面条。", " and wants a bowl of noodles.")),
    (("{who}困了", "{who} is sleepy"), ("，想早点睡觉。", " and wants to go to bed early.")),
    (("{who}感冒了", "{who} has a cold"), ("，要去医院看医生。", " and needs to see a doctor.")),
    (("{who}觉得冷", "{who} feels cold"), ("，想穿上外套。", " and wants to put on a coat.")),
    (("{who}觉得热", "{who} feels hot"), ("，想打开窗户。", " and wants to open the window.")),
    (("{who}迷路了", "{who} is lost"), ("，需要一张地图。", " and needs a map.")),
    (("{who}迟到了", "{who} is late"), ("，连忙说对不起。", " and says sorry at once.")),
    (("{who}忘了带雨伞", "{who} forgot to bring an umbrella"), ("，被雨淋湿了。", " and got wet in the rain.")),
    (("{who}要去旅行", "{who} is going on a trip"), ("，正在收拾行李。", " and is packing a suitcase.")),
    (("{who}丢了钱包", "{who} has lost a wallet"), ("，只好去找警察。", " and has to go to the police.")),
    (("{who}明天过生日", "{who} has a birthday tomorrow"), ("，想请大家吃蛋糕。", " and wants to share a cake.")),
]

# Completion from a word alone: the sentence that its class calls for.
USES: dict[str, Pair] = {
    "hobby": ("周末我常常{}。", "I often spend the weekend {}."),
    "outing": ("天气好的时候，我们去{}吧。", "Let us go {} when the weather is nice."),
    "place": ("我们在{}见面吧。", "Let us meet at the {}."),
    "drink": ("再来一杯{}吧。", "Let us have another cup of {}."),
    "dish": ("晚饭我们吃{}吧。", "Let us have {} for dinner."),
    "fruit": ("这些{}又大又甜。", "These {} are big and sweet."),
    "city": ("{}的夜景很美。", "{} is beautiful at night."),
    "animal": ("我第一次见到这么小的{}。", "I have never seen such a small {}."),
    "job": ("当{}不容易。", "It is not easy to be a {}."),
    "language": ("我的老师会说一点{}。", "My teacher speaks a little {}."),
    "thing": ("别忘了带上你的{}。", "Do not forget your {}."),
    "lesson": ("今天的{}课很有意思。", "The {} class was interesting today."),
}

# How a task is put to the model, in Chinese and in English.
INSTRUCTIONS: dict[str, tuple[list[str], list[str]]] = {
    "translate_zh_en": (
        ["翻译为英文", "请翻译成英文。", "把下面的句子翻译成英文。"],
        ["Translate into English", "Translate the sentence into English."],
    ),
    "translate_en_zh": (
        ["翻译为中文", "请翻译成中文。", "把下面的句子翻译成中文。"],
        ["Translate into Chinese", "Translate the sentence into Chinese."],
    ),
    "sentiment": (
        ["判断情感：正面、负面还是中性？", "这条评论的情感是什么？", "对下面的评论做情感分类。"],
        ["Is the review positive, negative or neutral?", "What is the sentiment of this review?"],
    ),
    "topic": (
        ["判断新闻的主题。", "这条新闻属于哪个主题？", "对下面的新闻做主题分类。"],
        ["What is the topic of the news?", "Classify the topic of this news."],
    ),
    "rewrite": (
        ["改写得更礼貌。", "请把这句话说得更客气。", "用礼貌的语气改写下面的句子。"],
        ["Rewrite the sentence politely.", "Make this request more polite."],
    ),
    "complete": (
        ["把句子补充完整。", "请续写下面的句子。", "接着写完这句话。"],
        ["Complete the sentence.", "Finish this sentence."],
    ),
    "use_word": (
        ["用“{}”写一个句子。", "请用“{}”造句。"],
        ['Write a sentence with "{}".', 'Use "{}" in a sentence.'],
    ),
}

# ----------------------------------------------------------------------------------------------------------------------
# Items: each sampler draws one, as its Chinese and its English pair of question and answer


def english_sentence(text: str) -> str:
    """Correct the article before a vowel and begin with a capital."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[:1].upper() + text[1:]


def fill(rng: random.Random, *templates: Pair) -> list[Pair]:
    """Fill the slots of the templates, the same word in the same slot, no word twice; English is left uncapitalised."""
    chosen: dict[str, Pair] = {}
    for slot in re.findall(r"{(\w+)}", "".join(chinese for chinese, _ in templates)):
        options = [word for word in WORDS[slot.rstrip("2")] if word not in chosen.values()]
        chosen.setdefault(slot, rng.choice(options))
    chinese_words, english_words = ({slot: word[i] for slot, word in chosen.items()} for i in (0, 1))
    return [(chinese.format(**chinese_words), english.format(**english_words)) for chinese, english in templates]


def sample_translation(rng: random.Random) -> tuple[Pair, Pair]:
    """A sentence: Chinese to English, English to Chinese."""
    [(chinese, english)] = fill(rng, rng.choice(SENTENCES))
    english = english_sentence(english)
    return (chinese, english), (english, chinese)


def sample_sentiment(rng: random.Random) -> tuple[Pair, Pair]:
    """A review and its sentiment."""
    sentiment = rng.randrange(len(SENTIMENTS))
    frame, subjects, parts = rng.choice(REVIEWED)
    subject = rng.choice(subjects)
    if rng.random() < 0.25:
        frame = rng.choice(VERDICTS[sentiment])
        review = [frame[i].format(subject[i]) for i in (0, 1)]
    else:
        first, second = rng.sample(list(parts), 2)
        finding, finding2 = rng.choice(parts[first][sentiment]), rng.choice(parts[second][sentiment])
        chinese = frame[0].format(subject[0], first[0] + finding[0], second[0] + finding2[0])
        review = [chinese, frame[1].format(subject[1], f"{first[1]} {finding[1]}", f"{second[1]} {finding2[1]}")]
    return (review[0], SENTIMENTS[sentiment][0]), (english_sentence(review[1]), SENTIMENTS[sentiment][1])


def sample_topic(rng: random.Random) -> tuple[Pair, Pair]:
    """A piece of news and its topic."""
    topic = rng.choice(list(NEWS))
    [(chinese, english)] = fill(rng, rng.choice(NEWS[topic]))
    return (chinese, topic[0]), (english_sentence(english), topic[1])


def sample_rewrite(rng: random.Random) -> tuple[Pair, Pair]:
    """A command and the polite request for the same thing."""
    [(chinese, english)] = fill(rng, rng.choice(COMMANDS))
    polite = [POLITE[0].format(chinese), POLITE[1].format(english)]
    return (chinese + "。", polite[0]), (english_sentence(english) + ".", polite[1])


def sample_complete(rng: random.Random) -> tuple[Pair, Pair]:
    """The beginning of a sentence and the whole of it."""
    (chinese, english), rest = fill(rng, *rng.choice(BEGINNINGS))
    english = english_sentence(english)
    return (chinese + "……", chinese + rest[0]), (english + " ...", english + rest[1])


def sample_use_word(rng: random.Random) -> tuple[Pair, Pair]:
    """A word and a sentence with it."""
    word_class = rng.choice(list(USES))
    word = rng.choice(WORDS[word_class])
    chinese, english = (USES[word_class][i].format(word[i]) for i in (0, 1))
    return (word[0], chinese), (word[1], english_sentence(english))


SAMPLERS: dict[str, Callable[[random.Random], tuple[Pair, Pair]]] = {
    "translation": sample_translation,
    "sentiment": sample_sentiment,
    "topic": sample_topic,
    "rewrite": sample_rewrite,
    "complete": sample_complete,
    "use_word": sample_use_word,
}


def is_held_out(item: tuple[Pair, Pair]) -> bool:
    """Whether an item belongs to the test: one in ten does, by a hash of its Chinese question."""
    return hashlib.sha256(item[0][0].encode()).digest()[0] % 10 == 0


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def make_row(rng: random.Random, task: str, pair: Pair, language: int) -> dict[str, str]:
    """One row with a Chinese (language 0) or English (1) instruction; for use_word the instruction holds the word."""
    instruction = rng.choice(INSTRUCTIONS[task][language])
    if task == "use_word":
        return {"instruction": instruction.format(pair[0]), "input": "", "output": pair[1], "task": "complete"}
    return {"instruction": instruction, "input": pair[0], "output": pair[1], "task": task}


def make_rows(seed: int, counts: dict[str, int], held_out: bool) -> list[dict[str, str]]:
    """Distinct rows, `counts` of each sampler, half of them on the Chinese and half on the English pair."""
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    if not held_out:
        for chinese, english in PHRASES:
            for task, pair in (("translate_zh_en", (chinese, english)), ("translate_en_zh", (english, chinese))):
                wording = INSTRUCTIONS[task][0][0]
                rows.append({"instruction": wording, "input": pair[0], "output": pair[1], "task": task})
                rows.append(make_row(rng, task, pair, language=1))
    for name, count in counts.items():
        seen: set[str] = set()
        while len(seen) < count:
            item = SAMPLERS[name](rng)
            side = len(seen) % 2
            if is_held_out(item) != held_out or item[0][0] in seen:
                continue
            seen.add(item[0][0])
            if name == "translation":
                task = ("translate_zh_en", "translate_en_zh")[side]
                rows.append(make_row(rng, task, item[side], rng.randrange(2)))
            else:
                rows.append(make_row(rng, name, item[side], side))
    rng.shuffle(rows)
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """A JSON list with one row on each line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8", newline="\n")


def main() -> None:
    train = {"translation": 500, "sentiment": 220, "topic": 220, "rewrite": 100, "complete": 60, "use_word": 60}
    test = {"translation": 112, "sentiment": 44, "topic": 44, "rewrite": 20, "complete": 12, "use_word": 8}
    folder = Path(__file__).parent
    write_rows(folder / "train.json", make_rows(0, train, held_out=False))
    write_rows(folder / "test.json", make_rows(1, test, held_out=True))


if __name__ == "__main__":
    main()
